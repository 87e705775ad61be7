"""isoFLOP curves of Mixture-of-Depths: runs at the optima, ratios of optima, and charts that figures share."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from sparsemix.report.figures import Chart, Line, Point, Star
from sparsemix.report.fits.curves import standing_runs
from sparsemix.report.isoflop import analyse
from sparsemix.report.numbers import DASH, exponent, fixed, is_number
from sparsemix.report.optimum import Runs, by_size
from sparsemix.report.records import Record
from sparsemix.report.study_plots import short
from sparsemix.reproduce.base import Lab
from sparsemix.reproduce.trends import Claim, Test, ordering

Analysis = dict[str, Any]
Loss = Callable[[Record], float]


def analysis_of(lab: Lab) -> Analysis:
    """The fits of the lab's runs, dense models as the baseline."""
    return analyse(lab.all(), baseline="dense")


def curve_of(analysis: Analysis, arm: str, budget: float) -> dict[str, Any]:
    """Points, fit and optimum of an arm at a budget; without any run, an empty curve."""
    found = next((c for c in analysis["curves"] if (c["arm"], c["budget"]) == (arm, budget)), None)
    return found or {"points": [], "optimum": None, "said": "no run ended"}


def quantity(analysis: Analysis, arm: str, budget: float) -> dict[str, Any]:
    return next((q for q in analysis["quantities"] if (q["arm"], q["budget"]) == (arm, budget)), {})


def sizes_at(runs: Sequence[Record], budget: float) -> tuple[Runs, ...]:
    """The fitted runs at a budget by size, each seed once, smallest first."""
    return by_size(run for run in runs if run.budget == budget)


def at_optimum(runs: Sequence[Record], budget: float) -> Runs:
    """The runs that stand for their arm at a budget; empty without a run."""
    found = standing_runs([run for run in runs if run.budget == budget])
    return next(iter(found.values()), ())


def best_ordering(
    analysis: Analysis, runs: Mapping[str, Sequence[Record]], budget: float, words: str, better: str, worse: str
) -> Test:
    """That one arm at its optimum is better than another at its own. Off its optimum an arm is worse than it could be,
    so who loses must have sizes on both sides of it; else nothing is told."""
    test = ordering(Claim(words, at_optimum(runs[better], budget), at_optimum(runs[worse], budget)))
    loser = worse if test.as_claimed else better
    if test.p_value is None or curve_of(analysis, loser, budget).get("bracketed"):
        return test
    return Test(words, False, None, f"{test.said}, but the optimum of {loser} is not bracketed")


def bracketed(analysis: Analysis, arm: str, budget: float) -> dict[str, Any] | None:
    """The optimum, if there are sizes on both sides of it."""
    curve = curve_of(analysis, arm, budget)
    return curve["optimum"] if curve.get("bracketed") else None


def ratio(arm: dict[str, Any] | None, base: dict[str, Any] | None, key: str) -> tuple[float | None, list[float] | None]:
    """One optimum's size over another's with a 95 % interval, in logarithms, as if their errors were independent; None
    where one is not known."""
    if not arm or not base:
        return None, None
    estimate, intervals = arm[key] / base[key], [arm.get(f"{key}_ci"), base.get(f"{key}_ci")]
    if any(not ends or not all(is_number(end) and end > 0 for end in ends) for ends in intervals):
        return estimate, None
    half = math.hypot(*(math.log(ends[1] / ends[0]) / 2 for ends in intervals if ends))
    return estimate, [estimate * math.exp(-half), estimate * math.exp(half)]


def missing_optimum(analysis: Analysis, arms: Sequence[str], budget: float) -> str:
    """Why there is no ratio of optima."""
    curves = {arm: curve_of(analysis, arm, budget) for arm in arms}
    said = [f"{arm}: {c['said'] or 'not bracketed'}" for arm, c in curves.items() if not c.get("bracketed")]
    return "; ".join(said) or "an interval is not bounded"


def within(value: float | None, ends: Sequence[float] | None, text: Callable[[float], str]) -> str:
    """'1.2 [1.1, 1.3]'."""
    if value is None:
        return DASH
    return text(value) + (f" [{text(ends[0])}, {text(ends[1])}]" if ends and all(map(is_number, ends)) else "")


def nats_text(value: float) -> str:
    return fixed(value, 4)


def curves_chart(analysis: Analysis, arms: Sequence[str], budgets: Sequence[float], id: str, title: str) -> Chart:
    """Loss against parameters: a marker a run, the fit as a line, its optimum as a star. Colours tell arms
    apart, dashes and markers every line."""
    lines = []
    for a, arm in enumerate(arms):
        for b, budget in enumerate(budgets):
            curve = curve_of(analysis, arm, budget)
            points = [(point["params"], nats) for point in curve["points"] for nats in point["seeds"]]
            if not points:
                continue
            name = arm if len(budgets) == 1 else f"{arm}, {exponent(budget)}"
            style = a * len(budgets) + b
            lines.append(Line(name, style, points, colour=a, path=_fit(curve), star=_star(curve["optimum"])))
    return Chart(id, title, "parameters", "test loss (nats per token)", lines, log_x=True, x_text=short)


def _star(best: dict[str, Any] | None) -> Star | None:
    return Star(best["params"], best["nats"], _ends(best["params_ci"]), _ends(best["nats_ci"])) if best else None


def _ends(ends: Sequence[float] | None) -> tuple[float, float] | None:
    return (ends[0], ends[1]) if ends and all(map(is_number, ends)) else None


def _fit(curve: dict[str, Any]) -> list[Point]:
    q = curve.get("quadratic")
    if not q:
        return []
    flops, params = (np.log10([point[key] for point in curve["points"]]) for key in ("forward_flops", "params"))
    xs = np.linspace(flops[0], flops[-1], 41)
    sizes = 10 ** np.interp(xs, flops, params)
    z = xs - curve["centre"]
    return list(zip(sizes.tolist(), (q["a"] + q["b"] * z + q["c"] * z * z).tolist(), strict=True))


def reference(analysis: Analysis, budget: float) -> tuple[float, float]:
    """(FLOPs per forward pass, nats) of the dense optimum, or where there is none of the dense runs that stand for
    it."""
    curve = curve_of(analysis, "dense", budget)
    best = curve["optimum"] or curve["standing"]
    return best["forward_flops"], best["nats"]


def relative(analysis: Analysis, runs: Sequence[Record], budget: float, loss: Loss) -> list[Point]:
    """(FLOPs per forward pass, loss) of every size over those of the dense optimum; means over seeds."""
    flops, nats = reference(analysis, budget)
    sizes = sizes_at(runs, budget)
    return [(size[0].forward_flops / flops, fmean(map(loss, size)) / nats) for size in sizes]


def relative_chart(
    lines: Mapping[str, Sequence[Point]], id: str, title: str, styles: Sequence[tuple[int, int]]
) -> Chart:
    """Loss over the dense optimum's against FLOPs per forward pass over its own; styles: a line's (dash, colour)."""
    drawn = [
        Line(name, dash, sorted(points), colour=colour)
        for (name, points), (dash, colour) in zip(lines.items(), styles, strict=True)
        if points
    ]
    return Chart(
        id, title, "FLOPs per forward pass over the dense optimum's", "loss over the dense optimum's", drawn,
        [("dense optimum", 1.0)], log_x=True, x_text=lambda x: f"{x:.2g}", x_references=[("its FLOPs", 1.0)],
    )  # fmt: skip
