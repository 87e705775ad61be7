"""Approach 2 (arXiv:2203.15556): a quadratic of the loss in log10 of the size, and its optimum with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from sparsemix.report.optimum import rank

LEVEL = 0.05
# Sizes this many nats above the best are left out: within it a quadratic misplaces the loss of the law's curve by less
# than 0.0005 nats and its optimum by less than 4 % (docs/fits.md); five sizes stay in any case.
FAR = 0.2
FEWEST, WANTED = 4, 5
# Spread of beta - alpha over published joint laws, which is what bends a curve of equal FLOPs off a parabola.
SKEW = 0.06
SEEDS_FOR_LEVEL = 3


class Sized(NamedTuple):
    """The runs of one size: its log10, and (seed, nats) of each."""

    x: float
    seeds: tuple[int, ...]
    nats: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.nats))


@dataclass(frozen=True)
class Quadratic:
    """nats = coef . (1, u, u^2), u = log10 of the size - centre, from the `sizes` (log10).

    cov: of coef, times a t variable of df degrees of freedom; level: mean nats, its standard error and degrees of
    freedom at the size `at` that has the seeds (at None: the curve's own). scatter: whether the sizes scatter about
    the curve more than seeds do (then the scatter is the error)."""

    centre: float
    coef: Float[np.ndarray, "3"]
    cov: Float[np.ndarray, "3 3"]
    df: int
    sd: float
    sizes: tuple[float, ...]
    dropped: tuple[float, ...]
    at: float | None
    level: tuple[float, float, int]
    scatter: bool

    @property
    def vertex(self) -> float:
        """log10 of the size where the slope is 0."""
        return float(self.centre - self.coef[1] / (2 * self.coef[2]))

    @property
    def vertex_interval(self) -> tuple[float, float] | None:
        """Fieller: sizes whose slope is not told from 0, exact for normal errors; None if that is not an interval with
        the curve turning upwards, so that nothing is known of an optimum."""
        _, b, c = self.coef
        t2 = _t(self.df) ** 2
        # (b + 2 c u)^2 <= t^2 Var(b + 2 c u)
        square, linear = 4 * (c * c - t2 * self.cov[2, 2]), 4 * (b * c - t2 * self.cov[1, 2])
        rest = b * b - t2 * self.cov[1, 1]
        if c <= 0 or square <= 0:
            return None
        root = max(linear**2 - 4 * square * rest, 0.0) ** 0.5
        low, high = (float(self.centre + (-linear + sign * root) / (2 * square)) for sign in (-1, 1))
        return low, high

    @property
    def bracketed(self) -> bool:
        """Two sizes or more on each side: with one, a single run would decide where its side of the curve turns."""
        if self.vertex_interval is None:
            return False
        below = sum(x < self.vertex for x in self.sizes)
        return below >= 2 and len(self.sizes) - below >= 2

    def above(self, x: float | np.ndarray, coef: np.ndarray | None = None) -> np.ndarray:
        """c (x - vertex)^2: nats that a size costs over the optimum; for coef (R, 3) an array (R,)."""
        coef = self.coef if coef is None else coef
        b, c = coef[..., 1], coef[..., 2]
        return c * (x - self.centre + b / (2 * c)) ** 2

    @property
    def minimum(self) -> tuple[float, float]:
        """(nats at the optimum, half of its interval): the measured level less what its size costs over the optimum,
        half^2 = (t se of seeds)^2 + (t se of the shape)^2."""
        _, b, c = self.coef
        v = -b / (2 * c)
        mean, se, df = self.level
        if self.at is None:
            gradient = np.array([1.0, v, v * v])
            return float(gradient @ self.coef), float(_t(self.df) * (gradient @ self.cov @ gradient) ** 0.5)
        u = self.at - self.centre
        gradient = np.array([0.0, u - v, u * u - v * v])
        shape = _t(self.df) * (gradient @ self.cov @ gradient) ** 0.5
        return float(mean - self.above(self.at)), float(np.hypot(_t(df) * se, shape))

    def draws(self, rng: np.random.Generator, resamples: int) -> Float[np.ndarray, "R 3"]:
        """Coefficients as the data leave them open: multivariate t around the fit."""
        root = np.linalg.cholesky(self.cov + 1e-300 * np.eye(3))
        scale = (self.df / rng.chisquare(self.df, resamples)) ** 0.5
        return self.coef + scale[:, None] * (rng.standard_normal((resamples, 3)) @ root.T)


def fit_quadratic(sizes: Sequence[Sized]) -> Quadratic | str:
    """The curve through the runs of one arm and budget, or in words why there is none.

    Errors of a run: normal, one variance for all sizes, from the spread of seeds and the scatter about the curve
    together (df = runs - 3); where the scatter is larger than the seeds' (F test at 5 %), from the scatter alone. The
    skew of the true curve, c (beta - alpha) ln 10 / 3 u^3, is a further error with beta - alpha ~ N(0, 0.06^2)."""
    sizes = sorted(sizes)
    if len(sizes) < FEWEST:
        number = "one size" if len(sizes) == 1 else f"{len(sizes)} sizes"
        return f"{number}: a quadratic with an error takes {FEWEST}"
    near, far = _near(sizes)
    x = np.array([s.x for s in near for _ in s.nats])
    y = np.array([n for s in near for n in s.nats])
    centre = float(np.mean([s.x for s in near]))
    u = x - centre
    design = np.stack([np.ones_like(u), u, u * u], axis=1)
    coef = np.linalg.lstsq(design, y, rcond=None)[0]
    variance, df, scatter = _error(near, y - design @ coef)
    coef, cov = _with_skew(design, u, y, coef, variance)
    vertex = centre - coef[1] / (2 * coef[2]) if coef[2] > 0 else centre
    seeded = max(near, key=lambda s: rank(len(s.nats), abs(s.x - vertex)))
    at, level = None, (0.0, 0.0, 1)
    if (m := len(seeded.nats)) >= SEEDS_FOR_LEVEL:
        sd = float(np.std(seeded.nats, ddof=1))
        at, level = seeded.x, (seeded.mean, sd / m**0.5, m - 1)
        if scatter:
            # Seeds do not tell how far this very size lies from the curve.
            level = (seeded.mean, (sd**2 / m + max(variance - sd**2, 0.0)) ** 0.5, df)
    kept, dropped = tuple(s.x for s in near), tuple(s.x for s in far)
    return Quadratic(centre, coef, cov, df, variance**0.5, kept, dropped, at, level, scatter)


def _near(sizes: Sequence[Sized]) -> tuple[list[Sized], list[Sized]]:
    """Those within FAR nats of the best, or the five around it, and the others."""
    best = min(range(len(sizes)), key=lambda i: sizes[i].mean)
    low, high = best, best
    # From the best outwards, so that what is kept is a stretch of the ladder without holes.
    while high - low + 1 < len(sizes):
        left = sizes[low - 1].mean if low > 0 else np.inf
        right = sizes[high + 1].mean if high + 1 < len(sizes) else np.inf
        if min(left, right) - sizes[best].mean > FAR and high - low + 1 >= WANTED:
            break
        low, high = (low - 1, high) if left <= right else (low, high + 1)
    return list(sizes[low : high + 1]), [*sizes[:low], *sizes[high + 1 :]]


def _error(sizes: Sequence[Sized], residuals: np.ndarray) -> tuple[float, int, bool]:
    """(variance of a run, degrees of freedom, is it the scatter's alone)."""
    total, df = float(residuals @ residuals), len(residuals) - 3
    pure = float(sum(len(s.nats) * np.var(s.nats) for s in sizes))
    pure_df, lack_df = df - (len(sizes) - 3), len(sizes) - 3
    # Equal losses of all seeds are no estimate of their spread.
    if pure_df and pure > 0:
        lack = max(total - pure, 0.0) / lack_df
        if special.fdtrc(lack_df, pure_df, lack / (pure / pure_df)) < LEVEL:
            return lack, lack_df, True
    return max(total / df, 1e-18), df, False


def _with_skew(
    design: np.ndarray, u: np.ndarray, y: np.ndarray, coef: np.ndarray, variance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and covariance by generalised least squares with the cubic term as an error."""
    cubic = np.zeros_like(u)
    if coef[2] > 0:
        # About the best size, not about a vertex that may lie far off the grid.
        vertex = np.clip(-coef[1] / (2 * coef[2]), u.min(), u.max())
        cubic = (u - vertex) ** 3 * coef[2] * SKEW * np.log(10) / 3
    inverse = np.linalg.inv(variance * np.eye(len(y)) + np.outer(cubic, cubic))
    cov = np.linalg.inv(design.T @ inverse @ design)
    return cov @ design.T @ inverse @ y, cov


def _t(df: float) -> float:
    return -float(special.stdtrit(df, LEVEL / 2))
