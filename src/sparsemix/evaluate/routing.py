"""Routing statistics from summed observations: expert usage and unevenness, predictor quality."""

from typing import Any

import numpy as np


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
