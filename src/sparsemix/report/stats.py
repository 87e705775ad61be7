"""Intervals and verdicts in bits per byte: what a comparison of kinds may claim, given its seeds and documents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Real
from scipy import special
from scipy.optimize import root_scalar

from sparsemix.config import ConfigError
from sparsemix.evaluate.estimate import effective

LEVEL = 0.05
RESAMPLES = 2000
SMALLEST_P = 1e-12


@dataclass(frozen=True)
class Interval:
    """A 95 % interval [low, high] around an estimate, in bits per byte; se^2 = se_seeds^2 + se_docs^2.

    With one seed nothing is known of other seeds: se_seeds = df_seeds = 0 and the interval is over documents only.
    effective_docs: how many equally long documents would weigh the same (0: none were looked at)."""

    estimate: float
    low: float
    high: float
    se: float
    se_seeds: float
    se_docs: float
    df_seeds: int
    df_docs: float
    effective_docs: float = 0.0

    @property
    def limit(self) -> str:
        """`seeds` or `documents`: of which there are too few, the part that makes the interval as wide as it is."""
        seeds = _t(self.df_seeds, LEVEL) * self.se_seeds if self.seeds_seen else np.inf
        return "seeds" if seeds >= _t(self.df_docs, LEVEL) * self.se_docs else "documents"

    @property
    def seeds_seen(self) -> bool:
        """Whether the interval speaks for other training seeds, not only for other documents."""
        return self.df_seeds > 0


@dataclass(frozen=True)
class Difference:
    """A kind's bits per byte minus the baseline's (negative is better), and the two-sided p-value of no difference.

    p_value <= 0.05 exactly where the interval excludes 0; none is below 1e-12."""

    interval: Interval
    p_value: float


def bits_per_byte(nats: Real[np.ndarray, "S D"], bytes_: Real[np.ndarray, "D"], resamples: int = RESAMPLES) -> Interval:
    """Mean over seeds of sum_d nats[s,d] / (ln 2 sum_d bytes[d]), with the interval
    half width^2 = (t(S-1) se_seeds)^2 + (t(D_eff-1) se_docs)^2, t = 97.5 % quantiles.

    se_seeds: spread of the seeds' ratios / sqrt(S). se_docs: ratio bootstrap over documents of the seed-averaged nats.
    Each part keeps its own t because one t with Welch-Satterthwaite degrees of freedom believes a spread of three
    seeds that is small by chance: at the level of four comparisons it then errs up to three times as often as promised.
    The price is an interval that covers up to 98 % where both parts weigh the same; noise of a document that differs
    from seed to seed is in both parts and widens it too (by at most sqrt 2 in se). D_eff = (sum b)^2 / sum b^2 is the
    number of equally long documents that would weigh the same. Raises ConfigError."""
    _check(nats, bytes_)
    num_seeds = len(nats)
    weights = bytes_.astype(np.float64)
    bits = nats.astype(np.float64) / np.log(2)
    ratios = bits.sum(axis=1) / weights.sum()
    estimate = float(ratios.mean())
    se_seeds = float(ratios.std(ddof=1)) / num_seeds**0.5 if num_seeds > 1 else 0.0
    se_docs = _document_se(bits.mean(axis=0), weights, resamples)
    docs = effective(weights)
    se = float(np.hypot(se_seeds, se_docs))
    point = Interval(estimate, estimate, estimate, se, se_seeds, se_docs, num_seeds - 1, max(docs - 1, 1.0), docs)
    half = float(_half_width(point, LEVEL))
    return replace(point, low=estimate - half, high=estimate + half)


def difference(
    nats: Real[np.ndarray, "S D"],
    base_nats: Real[np.ndarray, "S_base D_base"],
    bytes_: Real[np.ndarray, "D"],
    resamples: int = RESAMPLES,
) -> Difference:
    """`bits_per_byte` of the paired differences nats - base_nats: row s of both must be the same seed (the same data
    order and initialisation), column d the same document; what they share cancels. Raises ConfigError."""
    if nats.shape != base_nats.shape:
        raise ConfigError(
            f"nats {nats.shape} and base_nats {base_nats.shape} must have the same seeds and documents: "
            "compare the seeds that both kinds finished"
        )
    interval = bits_per_byte(nats.astype(np.float64) - base_nats.astype(np.float64), bytes_, resamples)
    return Difference(interval, _p_value(interval))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: adjusted <= 0.05 keeps the chance of any false verdict at 5 %."""
    m = len(p_values)
    adjusted, running = [0.0] * m, 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def smallest_visible(interval: Interval, comparisons: int, power: float = 0.8) -> float:
    """The true difference, in bits per byte, that this design resolves with probability `power` at the 5 % level
    after Bonferroni over `comparisons` (Holm resolves at least as much).

    Takes the measured standard errors for the true ones, so it is itself uncertain with few seeds. The chance of
    resolving is averaged over the errors a repeated study would have measured, se^2 chi^2(df) / df for each part:
    with a single part this is the noncentral t. Raises ConfigError."""
    if comparisons < 1 or not LEVEL < power < 1:
        raise ConfigError(f"comparisons={comparisons} must be >= 1 and power={power} in ({LEVEL}, 1), such as 0.8")
    if interval.se == 0:
        return 0.0
    factors = _spread(interval.df_seeds)[:, None], _spread(interval.df_docs)
    half = np.asarray(_half_width(interval, LEVEL / comparisons, *factors))

    def shortfall(delta: float) -> float:
        resolved = special.ndtr((delta - half) / interval.se) + special.ndtr((-delta - half) / interval.se)
        return power - float(resolved.mean())

    return float(root_scalar(shortfall, bracket=(0.0, float(half.max()) + 10 * interval.se)).root)


def verdict(difference: Difference, adjusted_p: float, visible: float, untuned: bool) -> str:
    """'better', 'worse' (than the baseline, at adjusted_p <= 0.05) or 'not resolved: ' and what could have been seen;
    one seed resolves nothing, whatever its p. ', untuned' follows where the kind's learning rate was not searched."""
    if not difference.interval.seeds_seen:
        text = "not resolved: one seed cannot tell a kind from its luck"
    elif adjusted_p <= LEVEL:
        text = "better" if difference.interval.estimate < 0 else "worse"
    else:
        more = "seeds" if difference.interval.limit == "seeds" else "test text"
        text = f"not resolved: could have seen a difference of {visible:.2g} bits/byte; more {more} would see more"
    return text + (", untuned" if untuned else "")


def _check(nats: np.ndarray, bytes_: np.ndarray) -> None:
    assert bytes_.shape == nats.shape[1:]
    if nats.shape[0] < 1 or nats.shape[1] < 2:
        raise ConfigError(f"nats {nats.shape} must be of seeds >= 1 and documents >= 2: evaluate on more documents")
    finite = np.isfinite(nats).all(axis=1)
    if not finite.all():
        raise ConfigError(f"nats of seed {int(finite.argmin())} must be finite: that run diverged, leave it out")
    if bytes_.min() < 1:
        raise ConfigError(f"bytes[{int(bytes_.argmin())}]={bytes_.min()} must be >= 1: leave empty documents out")


def _document_se(bits: Float[np.ndarray, "D"], weights: Float[np.ndarray, "D"], resamples: int) -> float:
    """Standard deviation of sum bits / sum weights over resampled documents."""
    num_docs = len(bits)
    fitted = bits.sum() / weights.sum() * weights
    # Leave-one-out residuals: a long document pulls the ratio to itself and would look less variable than it is.
    bits = fitted + (bits - fitted) / (1 - weights / weights.sum())
    rng = np.random.default_rng(0)
    rows = max(1, 2**21 // num_docs)
    ratios = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(num_docs, size=(min(rows, resamples - start), num_docs))
        ratios.append(bits[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return float(np.concatenate(ratios).std(ddof=1))


def _half_width(
    interval: Interval, level: float, seeds_factor: float | np.ndarray = 1.0, docs_factor: float | np.ndarray = 1.0
) -> float | np.ndarray:
    """Half the interval at 1 - level, had the squared standard errors come out so many times as large."""
    squared = _t(interval.df_docs, level) ** 2 * interval.se_docs**2 * docs_factor
    if interval.seeds_seen:
        squared = squared + _t(interval.df_seeds, level) ** 2 * interval.se_seeds**2 * seeds_factor
    return np.sqrt(squared)


def _t(df: int | float, level: float) -> float:
    return -float(special.stdtrit(df, level / 2))


def _p_value(interval: Interval) -> float:
    """The level at which the interval just reaches 0."""
    distance = abs(interval.estimate)
    if distance == 0:
        return 1.0
    if _half_width(interval, SMALLEST_P) <= distance:
        return SMALLEST_P
    # Over log p, where small p-values are as precise as large ones.
    found = root_scalar(lambda x: float(_half_width(interval, np.exp(x))) - distance, bracket=(np.log(SMALLEST_P), 0))
    return float(np.exp(found.root))


def _spread(df: int | float, points: int = 200) -> Float[np.ndarray, "points"]:
    """chi^2(df) / df at equally likely points; 1 where there is nothing to estimate."""
    if df == 0:
        return np.ones(1)
    return special.chdtri(df, (np.arange(points) + 0.5) / points) / df
