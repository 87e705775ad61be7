"""Losses as they might have come out: residuals of a fit with new signs, shared by runs of one seed."""

import zlib
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from sparsemix.report.fits.curves import Curve
from sparsemix.report.records import Record


def runs_of(curves: Sequence[Curve]) -> tuple[list[Record], list[Hashable]]:
    """(runs of the curves, the cluster of each): runs of one budget and seed at sizes that have several seeds are one
    cluster whatever their arm, since they saw the same text in the same order; every other run is its own."""
    runs, clusters = [], []
    for curve in curves:
        for point in curve.points:
            for run in point:
                runs.append(run)
                clusters.append((curve.budget, run.seed) if len(point) > 1 else (curve.budget, curve.arm, run.params))
    return runs, clusters


def resampled(
    fitted: Float[np.ndarray, "n"],
    residuals: Float[np.ndarray, "n"],
    leverage: Float[np.ndarray, "n"],
    clusters: Sequence[Hashable],
    resamples: int,
    seed: int = 0,
) -> Float[np.ndarray, "R n"]:
    """fitted + v residuals / (1 - leverage), v = -1 or 1, one for every cluster and resample.

    A wild bootstrap: every size stays, as a resample without one side of an optimum would say nothing; with one run
    at most sizes whole seeds cannot be left out. Signs alone, as a fit by absolute errors depends on how many residuals
    are near 0, which random sizes would change (Feng, He, Hu 2011). Leverage: a run at the edge pulls the fit to
    itself, and its residual is too small by that much (MacKinnon and White 1985, HC3). v depends on the cluster's name
    and `seed` alone, so that resample r of two arms, fitted apart, has the same v for the seeds that they share."""
    names = dict.fromkeys(clusters)
    drawn = {name: _generator(name, seed).choice([-1.0, 1.0], resamples) for name in names}
    v = np.stack([drawn[name] for name in clusters], axis=1)
    return fitted + v * residuals / np.maximum(1 - leverage, 0.05)


def percentiles(draws: Float[np.ndarray, "R"]) -> list[float] | None:
    """The middle 95 % of the finite draws; None below 20 of them."""
    told = draws[np.isfinite(draws)]
    if len(told) < 20:
        return None
    return [float(x) for x in np.percentile(told, [2.5, 97.5])]


def _generator(name: Hashable, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(repr(name).encode())])
