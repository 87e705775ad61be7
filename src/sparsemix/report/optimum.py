"""Which runs of a study stand for an arm at a budget: the one rule behind its verdicts, charts, tables and pages."""

from collections.abc import Iterable, Sequence
from math import log10
from statistics import fmean

from sparsemix.report.records import Record

# Of a run that only tried a learning rate nothing is fitted and nothing shown.
FITTED = ("grid", "seed")

# The runs of one size, a seed each, by seed.
Runs = tuple[Record, ...]


def by_size(records: Iterable[Record]) -> tuple[Runs, ...]:
    """The fitted runs of one arm and budget by size, ascending in forward FLOPs of a token; each seed of a size counts
    once, as a run may be both a size of the grid and a seed of the optimum."""
    sizes: dict[tuple[float, int], dict[int, Record]] = {}
    for record in records:
        if record.role in FITTED:
            sizes.setdefault((record.forward_flops, record.params), {}).setdefault(record.seed, record)
    return tuple(tuple(seeds[seed] for seed in sorted(seeds)) for _, seeds in sorted(sizes.items()))


def size_of(record: Record) -> float:
    """log10 of the forward FLOPs per token. They split a budget into size and text, whatever the kind; parameters do
    not, for a table's rows cost a token nothing, and need not grow with them."""
    return log10(record.forward_flops)


def standing(sizes: Sequence[Runs], vertex: float | None) -> Runs:
    """The runs of the size that has the most seeds, which a study gives to that next to the optimum; of equals those
    of the size nearest to `vertex`, the fitted optimum's log10 of FLOPs, or without one of the least mean loss; then of
    the smaller. Seeds come first: a difference is told by them, and losses of sizes so near differ by less."""

    def away(runs: Runs) -> float:
        return fmean(r.nats for r in runs) if vertex is None else abs(size_of(runs[0]) - vertex)

    return max(sizes, key=lambda runs: rank(len(runs), away(runs)))


def rank(num_seeds: int, away: float) -> tuple[int, float]:
    """What `standing` chooses the largest of, sizes ascending."""
    return num_seeds, -away
