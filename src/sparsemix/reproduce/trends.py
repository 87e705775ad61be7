"""Claims as tests: paired over seeds and test documents, corrected for the number of claims of a command."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsemix.report.records import Record
from sparsemix.report.stats import LEVEL, Difference, difference, holm, smallest_visible
from sparsemix.reproduce.base import Trend


class Claim(NamedTuple):
    """`better` has a lower loss than `worse`, as the paper says."""

    words: str
    better: Sequence[Record]
    worse: Sequence[Record]


def compare(runs: Sequence[Record], base: Sequence[Record]) -> Difference | None:
    """Bits per byte of `runs` minus `base`, paired over the seeds that both finished and over test documents; None
    without a common seed. Negative is better."""
    mine, theirs = {r.seed: r for r in runs}, {r.seed: r for r in base}
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    nats = np.stack([mine[seed].documents()[0] for seed in seeds])
    base_nats = np.stack([theirs[seed].documents()[0] for seed in seeds])
    return difference(nats, base_nats, mine[seeds[0]].documents()[1])


def orderings(claims: Sequence[Claim]) -> list[Trend]:
    """The claims, tested together: reproduced where the difference has the claimed sign at p <= 0.05 after Holm, not
    reproduced where it has the other one, else not resolved, with the effect that would have been seen."""
    found = [compare(claim.better, claim.worse) for claim in claims]
    seen = [d for d in found if d is not None and d.interval.seeds_seen]
    adjusted = iter(holm([d.p_value for d in seen]))
    trends = []
    for claim, d in zip(claims, found, strict=True):
        if d is None or not d.interval.seeds_seen:
            why = "no seed that both finished" if d is None else "one seed cannot tell a kind from its luck"
            trends.append(Trend(claim.words, "not resolved at this scale", why))
            continue
        p, at = next(adjusted), d.interval
        said = f"{at.estimate:+.4f} bits per byte [{at.low:+.4f}, {at.high:+.4f}], p = {p:.2g}, {at.df_seeds + 1} seeds"
        if p > LEVEL:
            visible = smallest_visible(at, len(seen))
            trends.append(Trend(claim.words, "not resolved at this scale", f"{said}; could have seen {visible:.2g}"))
        else:
            trends.append(Trend(claim.words, "reproduced" if at.estimate < 0 else "not reproduced", said))
    return trends
