"""Routing statistics from summed observations: expert usage, evenness, activation, predictor quality."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Below so many visits per expert, one that was not picked may still be alive (arXiv:2407.04153 measures usage).
MIN_VISITS = 10


def usage(gate_mass: np.ndarray) -> float:
    """Share of experts with any gate mass. Source: arXiv:2407.04153, section 3.3."""
    return float((gate_mass > 0).mean())


def unevenness(gate_mass: np.ndarray) -> float:
    """KL(z || uniform) in nats, z the normalised gate mass, 0 ln 0 = 0. Source: arXiv:2407.04153, section 3.3."""
    total = gate_mass.sum()
    if total <= 0:
        return float("nan")
    z = gate_mass[gate_mass > 0] / total
    return float(np.log(len(gate_mass)) + (z * np.log(z)).sum())


def spread(mass: np.ndarray) -> dict[str, Any]:
    """How evenly `mass` (picks or gate mass) lies over E experts, z its shares.

    unevenness: KL(z || uniform) = ln E - H(z), nats. effective: E exp(-KL) = exp(H(z)) experts. entropy: H(z), nats,
    and over ln E (1 where E = 1). max_over_mean: E max z. gini: 0 when even, 1 - 1/E on one expert.
    cover: the fewest experts that hold 50, 90 and 99 % of the mass. None where there is no mass."""
    E, total = len(mass), float(mass.sum())
    names = ("unevenness", "effective", "entropy", "normalised_entropy", "max_over_mean", "gini", "cover")
    if total <= 0:
        return dict.fromkeys(names)
    kl = max(0.0, unevenness(mass))
    z = np.sort(mass / total)
    entropy = max(0.0, float(np.log(E)) - kl)
    held = np.cumsum(z[::-1])
    # The last sum may miss its share by rounding alone.
    cover = {str(share): int((held < share / 100 - 1e-12).sum()) + 1 for share in (50, 90, 99)}
    values = (
        kl,
        float(E * np.exp(-kl)),
        entropy,
        entropy / float(np.log(E)) if E > 1 else 1.0,
        float(E * z[-1]),
        float((2 * np.arange(1, E + 1) - E - 1) @ z / E),
        cover,
    )
    return dict(zip(names, values, strict=True))


THRESHOLDS = np.logspace(-5, 0, 41)
STATED = (1e-4, 1e-3, 1e-2, 1e-1)


def activation(counts: np.ndarray, tokens: int, rows: int) -> dict[str, Any]:
    """Share of experts whose picks per token, and per row of the layer, exceed each threshold.

    A token of multi-head MoE is h rows, so picks per token flatter it h-fold; per row, layers of any h compare.
    Source: arXiv:2404.15045 counts an expert as active above a threshold that it does not give; hence the curve."""

    def share(thresholds: Sequence[float], of: int) -> list[float]:
        ordered = np.sort(counts) / max(1, of)
        return (1 - np.searchsorted(ordered, thresholds, side="right") / len(counts)).tolist()

    stated = {f"{t:g}": [share([t], of)[0] for of in (tokens, rows)] for t in STATED}
    curve = {"per_token": share(THRESHOLDS.tolist(), tokens), "per_row": share(THRESHOLDS.tolist(), rows)}
    return {"thresholds": THRESHOLDS.tolist(), **curve, "stated": stated}


def expert_report(counts: np.ndarray, gate_mass: np.ndarray, tokens: int, points: int = 200) -> dict[str, Any]:
    """Usage and unevenness by gate mass, picks-used share, and the sorted load curve at most `points` long."""
    load = np.sort(counts / max(1.0, counts.sum()))[::-1]
    if len(load) > points:
        load = load[np.unique(np.linspace(0, len(load) - 1, points).round().astype(int))]
    return {
        "num_experts": len(counts),
        "usage": usage(gate_mass),
        "picked": float((counts > 0).mean()),
        "unevenness": unevenness(gate_mass),
        "tokens": tokens,
        "load": load.tolist(),
    }


def expert_details(
    counts: np.ndarray, gate_mass: np.ndarray, gate_histogram: np.ndarray, tokens: int, rows: int
) -> dict[str, Any]:
    """`expert_report`, evenness by picks and by gate mass, gates and activation, for a layer that saw `tokens` tokens
    as `rows` rows (more than one a token in multi-head MoE)."""
    visits, by_gate = float(counts.sum()) / len(counts), spread(gate_mass)
    return {
        **expert_report(counts, gate_mass, tokens),
        "unevenness": by_gate["unevenness"],
        "rows": rows,
        "picks_per_token": float(counts.sum()) / max(1, tokens),
        "visits_per_expert": visits,
        "lower_bound": visits < MIN_VISITS,
        "by_gate": by_gate,
        "by_count": spread(counts),
        "gate_histogram": gate_histogram.tolist(),
        "activation": activation(counts, tokens, rows),
    }


def predictor_report(confusion: np.ndarray) -> dict[str, float]:
    """Quality against the top-k: [true positives, false positives, false negatives, true negatives] -> rates.

    `always_skip` is the accuracy of the constant answer, which any useful predictor must beat."""
    tp, fp, fn, tn = (float(v) for v in confusion)
    total = max(1.0, tp + fp + fn + tn)
    precision, recall = tp / max(1.0, tp + fp), tp / max(1.0, tp + fn)
    return {
        "accuracy": (tp + tn) / total,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-12, precision + recall),
        "routed_rate": (tp + fp) / total,
        "capacity": (tp + fn) / total,
        "always_skip": (fp + tn) / total,
    }


def taken_report(taken: np.ndarray) -> dict[str, Any]:
    """Tokens by how many experts took them: the shares of none, one and several, the mean, and the histogram."""
    shares = taken / max(1.0, taken.sum())
    return {
        "none": float(shares[0]),
        "one": float(shares[1:2].sum()),
        "several": float(shares[2:].sum()),
        "mean": float((shares * np.arange(len(taken))).sum()),
        "histogram": taken.tolist(),
    }


def routing_report(stats: dict[str, np.ndarray], passes: np.ndarray | None, tokens: int) -> dict[str, Any]:
    """Everything that summed evaluation statistics say about routing, by layer path."""
    report: dict[str, Any] = {"passes": None if passes is None else passes.tolist(), "predictor": {}, "experts": {}}
    for name, value in stats.items():
        path, _, stat = name.rpartition(".")
        if stat == "confusion":
            report["predictor"][path] = predictor_report(value)
        if stat == "gate_mass":
            report["experts"][path] = expert_report(stats[f"{path}.counts"], value, tokens)
    return report
