"""Cells that the tables of several reproductions share."""

from collections.abc import Sequence
from statistics import fmean, stdev

from sparsemix.report.numbers import DASH, fixed, si
from sparsemix.report.records import Record


def spread(values: Sequence[float], digits: int) -> str:
    """A mean, with the standard deviation over seeds where there are several."""
    if not values:
        return DASH
    mean = fixed(fmean(values), digits)
    return f"{mean} ± {fixed(stdev(values), digits)}" if len(values) > 1 else mean


def loss_cells(runs: Sequence[Record]) -> tuple[str, str, str, str]:
    """Bits per byte and nats per token (mean ± standard deviation over seeds), seeds, forward FLOPs per token."""
    if not runs:
        return DASH, DASH, "0", DASH
    losses = spread([r.bpb for r in runs], 4), spread([r.nats for r in runs], 4)
    return *losses, str(len(runs)), si(fmean(r.forward_flops for r in runs))
