"""Correlation of a routing statistic with the loss, with an interval from resampled documents."""

from typing import Any

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 1000
MIN_DOCUMENTS = 10
MAX_GROUPS = 500


def correlations(x: np.ndarray, y: np.ndarray, docs: np.ndarray) -> dict[str, Any]:
    """Pearson's r and Spearman's rho (r of the ranks, ties sharing their mean rank) of the tokens where x is a number.

    The 95 % intervals are percentiles over 1000 resamples of whole documents: tokens of one document are not
    independent. rho is resampled with the ranks of the whole sample; more than 500 documents are resampled as 500
    groups. None where x or y is constant; no interval under 10 documents."""
    seen = ~np.isnan(x)
    x, y, docs = x[seen].astype(np.float64), y[seen].astype(np.float64), docs[seen]
    names, groups = np.unique(docs, return_inverse=True)
    result: dict[str, Any] = {"tokens": len(x), "documents": len(names)}
    num_groups = min(len(names), MAX_GROUPS)
    for name, a, b in (("pearson", x, y), ("spearman", rankdata(x), rankdata(y))):
        moments = _moments(a, b, groups % max(1, num_groups), num_groups)
        result[name] = _correlation(moments.sum(axis=0))
        result[f"{name}_ci"] = _interval(moments) if result[name] is not None else None
    return result


def _moments(a: np.ndarray, b: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """Per document: count and sums of a, b, aa, bb, ab, about the means of the whole sample."""
    if not len(a):
        return np.zeros((0, 6))
    a, b = a - a.mean(), b - b.mean()
    sums = (np.ones_like(a), a, b, a * a, b * b, a * b)
    return np.stack([np.bincount(groups, weights, minlength=num_groups) for weights in sums], axis=1)


def _correlation(moments: np.ndarray) -> float | None:
    n, a, b, aa, bb, ab = (float(m) for m in moments)
    if not n or not np.isfinite(moments).all():
        return None
    var_a, var_b = aa - a * a / n, bb - b * b / n
    # What rounding leaves of a constant is no variance.
    if var_a <= 1e-12 * max(aa, 1e-300) or var_b <= 1e-12 * max(bb, 1e-300):
        return None
    return float(np.clip((ab - a * b / n) / np.sqrt(var_a * var_b), -1, 1))


def _interval(moments: np.ndarray) -> list[float] | None:
    if len(moments) < MIN_DOCUMENTS:
        return None
    rng = np.random.default_rng(0)
    draws = (
        _correlation(rng.multinomial(len(moments), np.full(len(moments), 1 / len(moments))) @ moments)
        for _ in range(RESAMPLES)
    )
    values = [value for value in draws if value is not None]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if values else None
