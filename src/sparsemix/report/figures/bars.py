"""Bars, and dots with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sparsemix.report.figures.axes import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    MARKERS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    axis_titles,
    frame,
    grid,
    nice_ticks,
    tick_labels,
    x_ticks,
)
from sparsemix.report.numbers import Markup, escape, fixed


@dataclass(frozen=True)
class Bars:
    """One bar per value, in percent of `total` (their sum if None). Bars are called 0, 1, 2, ... or by `names`;
    a histogram has `edges` instead, one more than values, which its axis then shows."""

    id: str
    title: str
    x_label: str
    values: Sequence[float]
    style: int
    names: Sequence[str] = ()
    edges: Sequence[float] = ()
    y_label: str = "tokens (%)"
    total: float | None = None

    def shares(self) -> list[float]:
        """The bars' heights in percent."""
        total = self.total or sum(self.values) or 1
        return [100 * value / total for value in self.values]

    def called(self) -> list[str]:
        """The bars' names."""
        ends = [f"{edge:.3g}".replace("-", "−") for edge in self.edges]
        spans = [f"{low} to {high}" for low, high in pairwise(ends)]
        return list(self.names) or spans or [str(i) for i in range(len(self.values))]

    def svg(self) -> Markup:
        """The bars as an <svg>. Needs at least one value."""
        shares, names = self.shares(), self.called()
        y_axis = Axis([0, *shares], HEIGHT - BOTTOM, TOP + 6)
        y_axis.low = 0.0
        # A histogram has a number at its left end, which the y axis' lowest one must not meet.
        left = LEFT + 12 if self.edges else LEFT
        slot = (WIDTH - RIGHT - left) / len(shares)
        middles = [left + slot * (i + 0.5) for i in range(len(shares))]
        every = math.ceil(len(shares) / 12)
        parts = [grid(y_axis), axis_titles(self.x_label, self.y_label)]
        for x, share, name in zip(middles, shares, names, strict=True):
            top, width = y_axis(share), slot * (0.72 if not self.edges else 0.9)
            box = f'x="{x - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{HEIGHT - BOTTOM - top:.1f}"'
            tip = f"<title>{escape(name)}: {fixed(share, 2)} %</title>"
            parts.append(f'<rect class="bar s{self.style % COLOURS}" {box}>{tip}</rect>')
            if every == 1:
                label = fixed(share, 0 if len(shares) > 8 else 1)
                parts.append(f'<text class="halo" x="{x:.1f}" y="{top - 4:.1f}" text-anchor="middle">{label}</text>')
        if self.edges:
            ticks = nice_ticks(self.edges[0], self.edges[-1])
            scale = (WIDTH - RIGHT - left) / (self.edges[-1] - self.edges[0])
            parts.append(x_ticks([left + scale * (tick - self.edges[0]) for tick in ticks], tick_labels(ticks)))
        else:
            parts.append(x_ticks(middles, [escape(name) if i % every == 0 else "" for i, name in enumerate(names)]))
        text = "; ".join(f"{name}: {fixed(share, 1)} %" for name, share in zip(names, shares, strict=True))
        return frame(self.id, self.title, f"{self.y_label} by {self.x_label}. {text}.", parts, HEIGHT)

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) of what is drawn."""
        ends = list(pairwise(self.edges)) if self.edges else [(None, None)] * len(self.values)
        rows = zip(self.called(), self.values, self.shares(), ends, strict=True)
        return ["name", "value", "percent", "low_edge", "high_edge"], [[n, v, s, *e] for n, v, s, e in rows]


@dataclass(frozen=True)
class Dots:
    """Differences as dots with their intervals and a line at zero, one row (name, style, value, low, high) each."""

    id: str
    title: str
    x_label: str
    points: Sequence[tuple[str, int, float, float, float]]

    def svg(self) -> Markup:
        """The dots as an <svg>. Needs at least one row."""
        names = [_lines(row[0]) for row in self.points]
        left, step = 150, 44 if any(len(words) > 1 for words in names) else 30
        height = (bottom := TOP + step * len(self.points)) + BOTTOM
        x_axis = Axis([0.0, *(x for row in self.points for x in row[2:])], left, WIDTH - RIGHT)
        ticks = x_axis.ticks()
        labels = [
            label if label.startswith("−") or not tick else f"+{label}"
            for tick, label in zip(ticks, tick_labels(ticks), strict=True)
        ]
        places = [x_axis(x) for x in ticks]
        parts = [x_ticks(places, labels, left, bottom), axis_titles(self.x_label, "", left, height)]
        parts.append(f'<path class="reference" d="M{x_axis(0):.1f},{TOP - 8}V{bottom}"/>')
        for i, (_, style, value, low, high) in enumerate(self.points):
            y = TOP + step * (i + 0.5)
            words = names[i]
            spans = f'</tspan><tspan x="{left - 12}" dy="1em">'.join(map(escape, words))
            first = f'<tspan x="{left - 12}" dy="{0.35 - 0.5 * (len(words) - 1)}em">'
            parts.append(f'<text y="{y}" text-anchor="end">{first}{spans}</tspan></text>')
            parts.append(
                f'<g class="s{style % COLOURS}"><path class="mean" d="M{x_axis(low):.1f},{y}H{x_axis(high):.1f}"/>'
                f'<path d="{MARKERS[style % len(MARKERS)]}" transform="translate({x_axis(value):.1f},{y})"/></g>'
            )
        said = [
            f"{name} {fixed(v, 4, True)} [{fixed(a, 4, True)}, {fixed(b, 4, True)}]" for name, _, v, a, b in self.points
        ]
        return frame(self.id, self.title, f"{self.x_label}: {'; '.join(said)}.", parts, height)

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) of what is drawn."""
        return ["name", "value", "low", "high"], [[name, *numbers] for name, _, *numbers in self.points]


def _lines(name: str) -> list[str]:
    """A kind's precision below its name, or what follows a comma if both do not fit a phone's letters side by side."""
    broken = name.replace("@", "\n@") if "@" in name or len(name) <= 15 else name.replace(", ", "\n")
    return [word if len(word) <= 15 else f"{word[:14]}…" for word in broken.split("\n")]
