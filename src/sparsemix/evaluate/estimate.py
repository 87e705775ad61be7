"""Ratios of sums over documents, with their standard errors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped


class Estimate(NamedTuple):
    """A value and its standard error; None where a sample says nothing of it (fewer than two documents)."""

    value: float
    error: float | None


def ratio(y: Shaped[np.ndarray, " n"], x: Shaped[np.ndarray, " n"], strata: Sequence[str] | None = None) -> Estimate:
    """R = sum y / sum x over documents, with the standard error of the ratio estimator:
    sqrt(sum_h n_h / (n_h - 1) sum_{i in h} (d_i - mean_h d)^2) / sum x, where d_i = y_i - R x_i.

    Documents differ in length, so R is a quotient of two random sums and not a mean of quotients: its error is that of
    the residuals d (linearisation; W. G. Cochran, Sampling Techniques, 1977, chapter 6), and long documents weigh more.
    `strata` names each document's source, whose number of documents is fixed; sources of one document share a stratum.
    The documents are taken for a simple random sample of each source, without a correction for a finite one."""
    total = float(x.sum())
    value = float(y.sum()) / total
    labels = np.array(strata if strata is not None else [""] * len(y))
    names, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    index = np.where(counts[index] == 1, len(names), index)
    variance = 0.0
    # Losses of a model that diverged are infinite, and so is what follows.
    with np.errstate(invalid="ignore"):
        residual = y - value * x
        for stratum in np.unique(index):
            own = residual[index == stratum]
            if len(own) < 2:
                return Estimate(value, None)
            variance += len(own) * float(own.var(ddof=1))
    return Estimate(value, float(np.sqrt(variance)) / total)


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate; its error to first order (delta method)."""
    # A model that diverged has an infinite perplexity.
    with np.errstate(over="ignore"):
        value = float(np.exp(estimate.value))
    return Estimate(value, None if estimate.error is None else value * estimate.error)


def share(right: Bool[np.ndarray, " n"]) -> Estimate:
    """p = mean(right), with the binomial standard error sqrt(p (1 - p) / (n - 1))."""
    p, n = float(right.mean()), len(right)
    return Estimate(p, float(np.sqrt(p * (1 - p) / (n - 1))) if n > 1 else None)
