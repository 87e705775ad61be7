"""Shares by row and column as a map of one colour, from none to full."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sparsemix.report.figures.axes import (
    BOTTOM,
    COLOURS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    axis_titles,
    frame,
    nice_ticks,
    tick_labels,
    x_ticks,
)
from sparsemix.report.numbers import Markup, escape, fixed

LEFT, ROW = 58, 24


@dataclass(frozen=True)
class HeatMap:
    """A cell for every row and span of x: `values` in [0, 1] by row, the first row lowest; `names` of the rows, and
    `edges` of the spans, one more than each row has values; `spans` say what is in each, for a pointer. The style's
    colour is a share of 1, the ground one of 0."""

    id: str
    title: str
    x_label: str
    y_label: str
    names: Sequence[str]
    edges: Sequence[float]
    values: Sequence[Sequence[float]]
    style: int = 1
    spans: Sequence[str] = ()

    def svg(self) -> Markup:
        """The map as an <svg>. Needs at least one row and one span."""
        bottom = TOP + ROW * len(self.values)
        x_axis = Axis([0, 1], LEFT, WIDTH - RIGHT)
        x_axis.low, x_axis.high = self.edges[0], self.edges[-1]
        parts = [axis_titles(self.x_label, self.y_label, LEFT, bottom + BOTTOM)]
        spans = self.spans or [f"{low:g} to {high:g}" for low, high in pairwise(self.edges)]
        for i, (name, row) in enumerate(zip(self.names, self.values, strict=True)):
            y = bottom - ROW * (i + 1)
            label = f'<text x="{LEFT - 6}" y="{y + ROW / 2:.1f}" dy=".35em" text-anchor="end">{escape(name)}</text>'
            cells = [
                f'<rect class="bar s{self.style % COLOURS}" fill-opacity="{share:.2f}" x="{x_axis(low):.2f}" '
                f'y="{y + 1}" width="{x_axis(high) - x_axis(low):.2f}" height="{ROW - 2}">'
                f"<title>{escape(name)}, {escape(span)}: {fixed(100 * share, 0)} %</title></rect>"
                for (low, high), span, share in zip(pairwise(self.edges), spans, row, strict=True)
            ]
            parts.append(label + "".join(cells))
        ticks = nice_ticks(self.edges[0], self.edges[-1])
        parts.append(x_ticks([x_axis(tick) for tick in ticks], tick_labels(ticks), LEFT, bottom))
        return frame(self.id, self.title, self._description(), parts, bottom + BOTTOM)

    def _description(self) -> str:
        rows = zip(self.names, self.values, strict=True)
        means = [f"{name}: {fixed(100 * sum(row) / len(row), 1)} %" for name, row in rows]
        return f"Shares by {self.y_label} over {self.x_label}; means: {'; '.join(means)}."

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) of what is drawn."""
        cells = [
            [name, low, high, share]
            for name, row in zip(self.names, self.values, strict=True)
            for (low, high), share in zip(pairwise(self.edges), row, strict=True)
        ]
        return ["row", "low_edge", "high_edge", "share"], cells
