"""Claims as tests: paired over seeds and test documents, corrected for the number of claims of a command."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy import special

from sparsemix.report.records import Record
from sparsemix.report.stats import LEVEL, SMALLEST_P, Difference, difference, holm, smallest_visible
from sparsemix.reproduce.base import Trend


class Claim(NamedTuple):
    """`better` has a lower loss than `worse`, as the paper says."""

    words: str
    better: Sequence[Record]
    worse: Sequence[Record]


Terms = Sequence[tuple[float, Sequence[Record]]]


class Test(NamedTuple):
    """A claim before correction: whether the estimate lies as claimed, the p-value of the edge of what is claimed, and
    the numbers. p_value None: it cannot be tested, and `said` is why. visible: of a number of claims, what could have
    been seen."""

    __test__ = False

    words: str
    as_claimed: bool
    p_value: float | None
    said: str
    visible: Callable[[int], str] | None = None


def judge(tests: Sequence[Test]) -> list[Trend]:
    """The claims, corrected together: reproduced where the estimate lies as claimed at p <= 0.05 after Holm, not
    reproduced where it lies otherwise, else not resolved, with the effect that would have been seen."""
    adjusted = iter(holm(p_values := [test.p_value for test in tests if test.p_value is not None]))
    trends = []
    for test in tests:
        p = None if test.p_value is None else max(next(adjusted), SMALLEST_P)
        said = test.said if p is None else f"{test.said}, p = {p:.2g}"
        if p is not None and p <= LEVEL:
            trends.append(Trend(test.words, "reproduced" if test.as_claimed else "not reproduced", said))
        else:
            seen = f"; {test.visible(len(p_values))}" if test.visible and p is not None else ""
            trends.append(Trend(test.words, "not resolved at this scale", said + seen))
    return trends


def compare(runs: Sequence[Record], base: Sequence[Record]) -> Difference | None:
    """Bits per byte of `runs` minus `base`, paired over the seeds that both finished and over test documents; None
    without a common seed. Negative is better."""
    return weighted([(1.0, runs), (-1.0, base)])


def ordering(claim: Claim) -> Test:
    """That one loss is lower than the other."""
    return contrast(claim.words, [(1.0, claim.better), (-1.0, claim.worse)])


def weighted(terms: Terms) -> Difference | None:
    """sum of weight * bits per byte over the terms, paired over the seeds that all of them finished and over test
    documents; None without a common seed. Weights sum to 0, so that what they share cancels."""
    runs = [{r.seed: r for r in records} for _, records in terms]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs)))
    if not seeds:
        return None
    num_bytes = runs[0][seeds[0]].documents()[1]
    nats = np.zeros((len(seeds), len(num_bytes)))
    for (weight, _), by_seed in zip(terms, runs, strict=True):
        nats += weight * np.stack([by_seed[seed].documents()[0] for seed in seeds])
    return difference(nats, np.zeros_like(nats), num_bytes)


def contrast(words: str, terms: Terms, unit: str = "bits per byte") -> Test:
    """That a weighted sum of losses is negative: an order of several arms, or one difference below another."""
    d = weighted(terms)
    if d is None or not d.interval.seeds_seen:
        why = "no seed that all of them finished" if d is None else "one seed cannot tell a kind from its luck"
        return Test(words, False, None, why)
    at = d.interval
    said = f"{at.estimate:+.4f} {unit} [{at.low:+.4f}, {at.high:+.4f}], {at.df_seeds + 1} seeds"
    return Test(
        words, at.estimate < 0, d.p_value, said, lambda claims: f"could have seen {smallest_visible(at, claims):.2g}"
    )


def ranking(words: str, worst_to_best: Sequence[Sequence[Record]]) -> Test:
    """That loss falls along the arms: its least-squares slope over their places."""
    return slope(words, list(enumerate(worst_to_best)), "bits per byte a place")


def slope(words: str, arms: Sequence[tuple[float, Sequence[Record]]], unit: str) -> Test:
    """That loss falls along x of (x, runs), by its least-squares slope, whose unit this is."""
    away = np.array([x for x, _ in arms])
    away = away - away.mean()
    weights = away / (away @ away)
    return contrast(words, [(float(w), runs) for w, (_, runs) in zip(weights, arms, strict=True)], unit)


def orderings(claims: Sequence[Claim]) -> list[Trend]:
    """Claims of order alone, judged together."""
    return judge([ordering(claim) for claim in claims])


def bounded(
    words: str,
    values: Sequence[float],
    low: float = -math.inf,
    high: float = math.inf,
    unit: str = "",
    per: str = "seeds",
) -> Test:
    """That the mean of a number that every seed gives (one value a seed) lies in [low, high], by a t-test against the
    nearer bound. per: what gave the values, if not seeds."""
    if len(values) < 2:
        why = "one seed cannot tell a kind from its luck" if values else "nothing was measured"
        return Test(words, False, None, why)
    mean, se, df = fmean(values), stdev(values) / len(values) ** 0.5, len(values) - 1
    half = -float(special.stdtrit(df, LEVEL / 2)) * se
    said = f"{mean:.4g}{unit} [{mean - half:.4g}, {mean + half:.4g}], {len(values)} {per}"
    distance = min(abs(mean - low), abs(mean - high))
    # Seeds that agree to the last digit leave no doubt, unless it is the bound that they agree on.
    p = 2 * float(special.stdtr(df, -distance / se)) if se else float(not distance)
    return Test(words, low <= mean <= high, p, said)


def estimated(
    words: str,
    estimate: float | None,
    interval: Sequence[float] | None,
    low: float = -math.inf,
    high: float = math.inf,
    unit: str = "",
    missing: str = "there is no estimate",
) -> Test:
    """That a quantity with a 95 % interval lies in [low, high], by a normal test against the nearer bound; on a scale
    of logarithms where the interval and bounds are positive. `missing`: why there may be none."""
    if estimate is None or interval is None or not all(map(math.isfinite, interval)):
        return Test(words, False, None, missing)
    said = f"{estimate:.4g}{unit} [{interval[0]:.4g}, {interval[1]:.4g}]"
    bounds = [bound for bound in (low, high) if math.isfinite(bound)]
    log = min(estimate, *interval, *bounds) > 0
    scale = math.log if log else float
    se = (scale(interval[1]) - scale(interval[0])) / (2 * NormalDist().inv_cdf(1 - LEVEL / 2))
    distance = min(abs(scale(estimate) - scale(bound)) for bound in bounds)
    p = 2 * NormalDist().cdf(-distance / se) if se else 0.0
    return Test(words, low <= estimate <= high, p, said)


def exact(words: str, holds: bool, said: str) -> Trend:
    """A claim that has no chance in it, such as that two runs are equal bit by bit."""
    return Trend(words, "reproduced" if holds else "not reproduced", said)
