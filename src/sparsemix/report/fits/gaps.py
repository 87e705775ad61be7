"""An arm against the baseline, each at its optimum of one budget: paired over seeds and documents."""

from dataclasses import dataclass

import numpy as np
from scipy import special

from sparsemix.config import ConfigError
from sparsemix.report.fits.curves import Curve
from sparsemix.report.records import Record
from sparsemix.report.stats import LEVEL, SMALLEST_P, Difference, Interval, difference

BOTH = "paired t over seeds and ratio bootstrap over documents"
SEEDS = "paired t over seeds (no losses of documents)"
WELCH = "difference of the fitted optima, t of each fit"


@dataclass(frozen=True)
class Gap:
    """Bits per byte of an arm minus the baseline's, with the test that its p-value is from."""

    difference: Difference
    test: str
    seeds: int


def gap_between(arm: Curve, base: Curve, resamples: int) -> Gap | None:
    """The gap at the sizes that have the seeds, over the seeds both have; with fewer than two of them the gap of the
    fitted optima, which no verdict is built on. None where neither can be told. Raises ConfigError."""
    own, other = ({r.seed: r for r in curve.seeded} for curve in (arm, base))
    both = sorted(own.keys() & other.keys())
    if len(both) >= 2:
        return _paired([own[s] for s in both], [other[s] for s in both], resamples)
    if arm.optimum is None or base.optimum is None:
        return None
    (nats, half), (base_nats, base_half) = arm.optimum.minimum, base.optimum.minimum
    estimate = (nats - base_nats) * arm.bpb
    wide = float(np.hypot(half, base_half)) * arm.bpb
    interval = Interval(estimate, estimate - wide, estimate + wide, wide / 2, 0.0, 0.0, 0, 1.0)
    return Gap(Difference(interval, float("nan")), WELCH, len(both))


def _paired(own: list[Record], other: list[Record], resamples: int) -> Gap:
    try:
        losses = [record.documents() for record in (*own, *other)]
    except FileNotFoundError:
        return Gap(_over_seeds(own, other), SEEDS, len(own))
    num_bytes = losses[0][1]
    for (_, theirs), record in zip(losses, (*own, *other), strict=True):
        if not np.array_equal(theirs, num_bytes):
            raise ConfigError(
                f"these runs cannot be compared: the test documents of {own[0].folder} and {record.folder} differ; "
                "give them the same train.test_tokens"
            )
    nats = np.stack([n for n, _ in losses])
    return Gap(difference(nats[: len(own)], nats[len(own) :], num_bytes, resamples), BOTH, len(own))


def _over_seeds(own: list[Record], other: list[Record]) -> Difference:
    gaps = np.array([a.bpb - b.bpb for a, b in zip(own, other, strict=True)])
    df = len(gaps) - 1
    estimate, se = float(gaps.mean()), float(gaps.std(ddof=1)) / len(gaps) ** 0.5
    half = -float(special.stdtrit(df, LEVEL / 2)) * se
    p = 1.0 if estimate == 0 else 2 * float(special.stdtr(df, -abs(estimate) / se)) if se > 0 else SMALLEST_P
    interval = Interval(estimate, estimate - half, estimate + half, se, se, 0.0, df, 1.0)
    return Difference(interval, max(p, SMALLEST_P))
