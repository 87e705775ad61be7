"""Tables that the reproductions of the multi-head papers share: losses of the study's own text, and effects."""

from collections.abc import Mapping, Sequence
from math import log
from statistics import fmean
from typing import NamedTuple

from sparsemix.report.numbers import DASH, fixed, interval, percent, si
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.report.stats import smallest_visible
from sparsemix.reproduce.tables import loss_cells, spread
from sparsemix.reproduce.trends import Terms, weighted

LOSS_COLUMNS = (
    "model",
    "half of training: validation bits per byte",
    "end: validation bits per byte",
    "end: test bits per byte",
    "end: test nats per token",
    "seeds",
    "FLOPs per token",
    "training FLOPs",
    "tokens",
    "parameters",
)


class Effect(NamedTuple):
    """A difference of losses, ours and the paper's: `terms` weigh our arms' runs, `paper` the paper's losses (nats per
    token) of each column, empty where it has none."""

    words: str
    terms: Terms
    paper: Sequence[float] = ()


def at_half(record: Record) -> float | None:
    """Validation bits per byte at half of the run's training FLOPs; None if no evaluation lies within a tenth."""
    near = min(record.curve, key=lambda at: abs(at[0] / record.flops - 0.5), default=None)
    return None if near is None or abs(near[0] / record.flops - 0.5) > 0.1 else near[2]


def router_note(runs: Mapping[str, Sequence[Record]]) -> str:
    """What leaving the router out does to the comparison."""
    flops = {arm: fmean(r.flops for r in records) for arm, records in runs.items()}
    most = max(flops, key=lambda arm: flops[arm])
    return (
        "As in the paper, models train for equal steps, and FLOPs are equal without the router. With it they are not: "
        f"{most} spends {percent(flops[most] / min(flops.values()) - 1)} more than the least. The smaller the width, "
        "the larger the router's share; it works for many heads."
    )


def loss_table(caption: str, runs: Mapping[str, Sequence[Record]]) -> TextTable:
    """What every arm reached on the study's text, and what it took."""
    rows = []
    for arm, records in runs.items():
        half = [value for record in records if (value := at_half(record)) is not None]
        bpb, nats, seeds, flops = loss_cells(records)
        sizes = [si(fmean(of)) for of in ([r.flops for r in records], [r.tokens for r in records])]
        params = si(records[0].params)
        rows.append([arm, spread(half, 4), spread([r.validation_bpb for r in records], 4), bpb, nats, seeds, flops])
        rows[-1] += [*sizes, params]
    return TextTable(caption, LOSS_COLUMNS, rows)


def effects_table(effects: Sequence[Effect], columns: Sequence[str]) -> TextTable:
    """Differences in nats per token with 95 % intervals, what this design would have seen with 80 % power, and the
    paper's; `columns` name the paper's."""
    rows = []
    for effect in effects:
        d, unit = weighted(effect.terms), nats_per_bit([r for _, records in effect.terms for r in records])
        mine = [DASH, DASH, DASH]
        if d is not None and d.interval.seeds_seen:
            at = d.interval
            seen = smallest_visible(at, len(effects))
            mine = [fixed(at.estimate * unit, 4, True), interval((at.low * unit, at.high * unit), 4, True)]
            mine.append(fixed(seen * unit, 4))
        theirs = [fixed(value, 4, True) for value in effect.paper] or [DASH] * len(columns)
        rows.append([effect.words, *mine, *theirs])
    named = [f"paper, {name}" for name in columns]
    caption = "Effects in nats per token (negative: the first is better)"
    return TextTable(caption, ["difference", "here", "95 % interval", "could have seen", *named], rows)


def nats_per_bit(records: Sequence[Record]) -> float:
    """Nats per token for a bit per byte, which all models on one text and vocabulary share."""
    return fmean(record.nats / record.bpb for record in records)


def difference(
    better: str, worse: str, runs: Mapping[str, Sequence[Record]], paper: Mapping[str, Sequence[float]]
) -> Effect:
    """The loss of one arm minus another's; the paper's perplexities as differences of their logarithms."""
    both = better in paper and worse in paper
    theirs = [log(a) - log(b) for a, b in zip(paper[better], paper[worse], strict=True)] if both else ()
    return Effect(f"{better} minus {worse}", [(1.0, runs[better]), (-1.0, runs[worse])], theirs)
