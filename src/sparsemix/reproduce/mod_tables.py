"""Tables and seed-by-seed numbers that several reproductions of Mixture-of-Depths share."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from sparsemix.report.numbers import DASH, fixed
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.tables import loss_cells, spread

LOSSES = ("bits per byte", "nats per token", "seeds", "FLOPs per token")


def lookahead_nats(run: Record) -> float:
    """Nats per token under the routing of training, which is no likelihood where it compares a token with later ones;
    the causal loss where there is no such routing."""
    return run.nats if run.lookahead_bpb is None else run.nats * run.lookahead_bpb / run.bpb


def loss_table(caption: str, runs: Mapping[str, Sequence[Record]], paper: Mapping[str, object], what: str) -> TextTable:
    """Causal losses by arm, the loss under the routing of training beside them, and what the paper says; `what` is
    that in words. A number of the paper is a loss, anything else its own words."""
    rows = []
    for arm, found in runs.items():
        ahead = spread([lookahead_nats(r) for r in found if r.lookahead_bpb is not None], 4)
        said = paper.get(arm, DASH)
        rows.append([arm, *loss_cells(found), ahead, fixed(said, 2) if isinstance(said, float) else str(said)])
    return TextTable(caption, ("arm", *LOSSES, "nats under the top-k", what), rows)


def by_seed(runs: Sequence[Record], base: Sequence[Record], value: Callable[[Record, Record], float]) -> list[float]:
    """`value(run, base)` of every seed that both finished."""
    theirs = {r.seed: r for r in base}
    return [value(r, theirs[r.seed]) for r in sorted(runs, key=lambda r: r.seed) if r.seed in theirs]


def percent_above(loss: Callable[[Record], float]) -> Callable[[Record, Record], float]:
    """By how many per cent a run's loss is above another's."""
    return lambda run, base: 100 * (loss(run) / loss(base) - 1)


def rates(run: Record) -> dict[str, float]:
    """Accuracy, precision, recall, ... of the causal rule on test text against the top-k, means over the layers."""
    layers = list(run.result["routing"]["predictor"].values())
    return {name: fmean(layer[name] for layer in layers) for name in layers[0]} if layers else {}
