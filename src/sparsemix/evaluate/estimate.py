"""Ratios of sums over documents, with their standard errors, and what counts as a document."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real, Shaped

# Fewer documents of equal weight say too little of other documents: their parts stand in for them.
ENOUGH_DOCUMENTS = 10


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


class Units(NamedTuple):
    """What an interval resamples: losses (S, U) and bytes (U,) of documents, or of their parts where there are few."""

    nats: Float[np.ndarray, "S U"]
    bytes: Int[np.ndarray, " U"]
    by_part: bool


def effective(weights: Real[np.ndarray, " D"]) -> float:
    """(sum w)^2 / sum w^2: how many equal weights would weigh the same."""
    return float(weights.sum(dtype=np.float64) ** 2 / np.square(weights, dtype=np.float64).sum())


def units(
    nats: Real[np.ndarray, "S P"], bytes_: Int[np.ndarray, " P"], groups: Int[np.ndarray, " P"] | None = None
) -> Units:
    """The parts of each group (a document, or near-copies of one) summed, for parts of one text are not independent.

    Groups that weigh no more than 10 equally long ones could say nothing of other texts. Their parts are taken for
    independent then, and the interval speaks of more text of these documents, not of other documents."""
    if groups is None or len(np.unique(groups)) == len(groups):
        return Units(nats, bytes_, by_part=False)
    _, of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(of, weights=bytes_).astype(bytes_.dtype)
    if effective(sizes) < ENOUGH_DOCUMENTS:
        return Units(nats, bytes_, by_part=True)
    return Units(np.stack([np.bincount(of, weights=row) for row in nats]), sizes, by_part=False)
