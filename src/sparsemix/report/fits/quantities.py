"""The quantities people quote of an arm at a budget, each with its interval, and the verdict against the baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsemix.report.fits.curves import Curve
from sparsemix.report.fits.equal_loss import (
    FAR_BUDGET,
    Line,
    Optimum,
    clock_noise,
    equal_pair,
    multipliers,
    optimum_of,
    steps_per_s,
    vertex_gap,
)
from sparsemix.report.fits.gaps import Gap, gap_between
from sparsemix.report.optimum import size_of
from sparsemix.report.stats import holm, smallest_visible, verdict

NOTHING = dict.fromkeys((
    "gap_nats", "gap_nats_ci", "gap_percent", "gap_percent_ci", "gap_bpb", "gap_bpb_ci", "p_value", "test", "visible",
    "forward_ratio", "forward_ratio_ci", "flop_multiplier", "flop_multiplier_ci", "wall_multiplier",
    "wall_multiplier_ci", "steps_per_s_ratio", "steps_per_s_ratio_ci", "seeds", "effective_documents", "limit",
))  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """What verdicts rest on: who the baseline is, whose rate was searched, the curves (arm, budget) with runs that
    repeat their text too often, and those of which runs diverged."""

    baseline: str
    tuned: frozenset[str]
    repeated: frozenset[tuple[str, float]]
    resamples: int
    by_law: Callable[[float, float], float] | None = None
    diverged: frozenset[tuple[str, float]] = frozenset()


def quantities_of(
    curves: Sequence[Curve], optima: dict[tuple[str, float], Optimum | None], line: Line | None, terms: Terms
) -> tuple[list[dict[str, Any]], list[str]]:
    """(entries of `quantities`, arms in the order of the curves; warnings). Raises ConfigError."""
    rng = np.random.default_rng(1)
    bases = {c.budget: c for c in curves if c.arm == terms.baseline}
    compared = [c for c in curves if c.arm != terms.baseline and c.budget in bases]
    gaps = {(c.arm, c.budget): gap_between(c, bases[c.budget], terms.resamples) for c in compared}
    tested = {key: gap for key, gap in gaps.items() if gap is not None and gap.difference.interval.seeds_seen}
    adjusted = dict(zip(tested, holm([gap.difference.p_value for gap in tested.values()]), strict=True))
    entries, said = [], []
    for curve in curves:
        key, base = (curve.arm, curve.budget), bases.get(curve.budget)
        entry = _own(curve) | NOTHING | {"verdict": "baseline" if curve is base else "no verdict: no baseline"}
        gap = gaps.get(key)
        if base is not None and curve is not base:
            entry |= _verdict(curve, base, gap, adjusted.get(key), len(tested), terms)
        if gap is not None and base is not None:
            entry |= _gap(gap, base)
            own, other = optima[key], optima[base.arm, base.budget]
            # Beyond the sizes that were run a curve's bottom is a guess, and what rests on it another.
            if own is not None and other is not None and curve.bracketed and base.bracketed:
                found, lines = _equal_loss(own, other, gap, line, terms, rng)
                entry |= found
                said += lines
        entries.append(entry)
    return entries, said


def _own(curve: Curve) -> dict[str, Any]:
    found = curve.as_data()["optimum"] or {}
    names = {"optimal_params": "params", "optimal_params_ci": "params_ci"}
    names |= {name: name for name in ("nats", "nats_ci", "bpb", "bpb_ci")}
    return {"arm": curve.arm, "budget": curve.budget} | {name: found.get(theirs) for name, theirs in names.items()}


def _gap(gap: Gap, base: Curve) -> dict[str, Any]:
    """The gap in bits per byte, nats per token and per cent of the baseline's loss."""
    interval = gap.difference.interval
    loss = base.optimum.minimum[0] if base.optimum else float(np.mean([r.nats for r in base.seeded]))
    bpb = interval.estimate, [interval.low, interval.high]
    return {
        "gap_bpb": bpb[0],
        "gap_bpb_ci": bpb[1],
        "gap_nats": bpb[0] / base.bpb,
        "gap_nats_ci": [end / base.bpb for end in bpb[1]],
        "gap_percent": 100 * bpb[0] / base.bpb / loss,
        "gap_percent_ci": [100 * end / base.bpb / loss for end in bpb[1]],
        "test": gap.test,
        "seeds": gap.seeds,
        "effective_documents": interval.effective_docs,
        "limit": interval.limit,
    }


def _verdict(
    curve: Curve, base: Curve, gap: Gap | None, adjusted: float | None, tested: int, terms: Terms
) -> dict[str, Any]:
    if lost := [c.arm for c in (curve, base) if (c.arm, c.budget) in terms.diverged]:
        return {"verdict": f"no verdict: runs of {' and '.join(lost)} diverged, and losses are of those that did not"}
    if gap is None:
        return {"verdict": "no verdict: no optimum and no two seeds in common"}
    if adjusted is None:
        return {"verdict": "not resolved: one seed cannot tell a kind from its luck"}
    visible = smallest_visible(gap.difference.interval, tested)
    said = verdict(gap.difference, adjusted, visible, curve.arm not in terms.tuned)
    if {(curve.arm, curve.budget), (base.arm, base.budget)} & terms.repeated:
        said = "no verdict: more than 4 epochs over the training text"
    elif len(curve.points) == len(base.points) == 1:
        said += ", at one size"
    # Off the optimum a loss is too high. So an arm that is better although it is not at its optimum is better, but one
    # that is better than a baseline that is not at its own may not be.
    elif said.startswith("better") and not base.bracketed:
        said = f"no verdict: the optimum of {base.arm} is not bracketed"
    elif said.startswith("worse") and not curve.bracketed:
        said = f"no verdict: the optimum of {curve.arm} is not bracketed"
    return {"verdict": said, "p_value": adjusted, "visible": visible / base.bpb}


def _equal_loss(
    arm: Optimum, base: Optimum, gap: Gap, line: Line | None, terms: Terms, rng: np.random.Generator
) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    said = []
    between = vertex_gap(arm, base, gap, rng)
    name = f"{arm.curve.arm} at {arm.curve.budget:.3g} FLOPs"
    noise = clock_noise([arm.curve, base.curve], rng, len(arm.vertices))
    if (pair := equal_pair(arm, base, between)) is not None:
        found["forward_ratio"], found["forward_ratio_ci"] = pair.ratio(lambda r: r.forward_flops)
        found["steps_per_s_ratio"], found["steps_per_s_ratio_ci"] = pair.ratio(steps_per_s, noise)
        if pair.x < size_of(arm.curve.points[0][0]):
            said.append(
                f"{name}: the smallest model that reaches the baseline's loss is "
                "smaller than any that was run; its FLOPs are extrapolated"
            )
    if line is not None and (more := multipliers(arm, base, between, line, noise, terms.by_law)) is not None:
        needed = more.pop("budget")
        found |= more
        if not line.low / FAR_BUDGET <= needed <= line.high * FAR_BUDGET:
            said.append(
                f"{name}: {terms.baseline} would need {needed:.3g} FLOPs for its "
                f"loss, far from the budgets that were run ({line.low:.3g} to {line.high:.3g}): extrapolated"
            )
    return found, said


def draw_optima(curves: Sequence[Curve], resamples: int) -> dict[tuple[str, float], Optimum | None]:
    """The optimum of every curve, with draws."""
    rng = np.random.default_rng(0)
    return {(curve.arm, curve.budget): optimum_of(curve, rng, resamples) for curve in curves}
