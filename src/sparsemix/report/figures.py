"""Charts as inline SVG. Colours are CSS classes `s0`...`s7`, so that light, dark and
print follow the page; markers and dashes differ as well, so that no chart needs its colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sparsemix.report.numbers import Markup, escape, exponent, fixed

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 34, 54
COLOURS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "M-3.5,-3.5h7v7h-7z",
    "M0,-4.8L4.6,3.4H-4.6z",
    "M0,-5L5,0L0,5L-5,0z",
    "M0,4.8L4.6,-3.4H-4.6z",
    "M-5,-1.6h3.4v-3.4h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4z",
    "M0,-5L4.8,-1.2L3,4.4H-3L-4.8,-1.2z",
)

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One named line of a chart. `style` picks dash, marker and, unless given, colour; `thin` the runs behind it."""

    name: str
    style: int
    points: Sequence[Point]
    thin: Sequence[Sequence[Point]] = ()
    ring: Point | None = None
    colour: int | None = None

    @property
    def css(self) -> str:
        """The CSS class of its colour."""
        return f"s{(self.style if self.colour is None else self.colour) % COLOURS}"


@dataclass(frozen=True)
class Chart:
    """A line chart over `lines`. `x_scale` divides what the x axis prints; `references` are horizontal lines.
    A reference far outside the lines would flatten them, so it is left out and listed by `outside`."""

    id: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    references: Sequence[tuple[str, float]] = ()
    x_scale: float = 1.0
    log_x: bool = False
    y_zero: bool = False
    log_y: bool = False
    x_ticks: Sequence[float] = field(default=())

    def _y_data(self) -> list[float]:
        return [y for line in self.lines for part in (line.points, *line.thin) for _, y in part]

    def _inside(self) -> list[tuple[str, float]]:
        low, high = min(self._y_data()), max(self._y_data())
        slack = 0.35 * ((high - low) or abs(high) or 1)
        return [(name, y) for name, y in self.references if low - slack <= y <= high + slack]

    def outside(self) -> list[tuple[str, float]]:
        """The references that the chart does not show."""
        return [reference for reference in self.references if reference not in self._inside()]

    def svg(self) -> Markup:
        """The chart as an <svg>. Needs at least one point."""
        xs = [x for line in self.lines for part in (line.points, *line.thin) for x, _ in part]
        ys = [*self._y_data(), *(y for _, y in self._inside()), *([0.0] if self.y_zero else [])]
        x_axis, y_axis = _Axis(xs, LEFT, WIDTH - RIGHT, self.log_x), _Axis(ys, HEIGHT - BOTTOM, TOP, self.log_y)
        if self.y_zero:
            y_axis.low = 0.0
        ticks = self.x_ticks or [
            tick * self.x_scale for tick in nice_ticks(x_axis.low / self.x_scale, x_axis.high / self.x_scale)
        ]
        labels = [exponent(x) for x in ticks] if self.log_x else tick_labels([x / self.x_scale for x in ticks])
        parts = [_x_ticks([x_axis(x) for x in ticks], labels), _grid(y_axis), _axis_titles(self.x_label, self.y_label)]
        for _, y in self._inside():
            parts.append(f'<path class="reference" d="M{LEFT},{y_axis(y):.1f}H{WIDTH - RIGHT}"/>')
        for line in self.lines:
            paths = [_path(part, x_axis, y_axis, "thin") for part in line.thin if len(part) > 1]
            paths.append(_path(line.points, x_axis, y_axis, "mean", DASHES[line.style % len(DASHES)]))
            paths += [self._marker(line, point, x_axis, y_axis) for point in spread(line.points, 9)]
            if line.ring:
                x, y = line.ring
                paths.append(f'<circle class="ring" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="8"/>')
            parts.append(f'<g class="{line.css}">{"".join(paths)}</g>')
        for name, y in self._inside():
            label = f"{escape(name)} {fixed(y, 2)}"
            parts.append(
                f'<text class="halo" x="{WIDTH - RIGHT - 2}" y="{y_axis(y) - 5:.1f}" text-anchor="end">{label}</text>'
            )
        return _svg(self.id, self.title, self._description(), parts, HEIGHT)

    def _marker(self, line: Line, point: Point, x_axis: "_Axis", y_axis: "_Axis") -> str:
        x, y = point
        where = exponent(x) if self.log_x else fixed(x / self.x_scale, 3)
        tip = f"<title>{escape(line.name)}: {fixed(y, 4)} at {where}</title>"
        shape = MARKERS[line.style % len(MARKERS)]
        return f'<path d="{shape}" transform="translate({x_axis(x):.1f},{y_axis(y):.1f})">{tip}</path>'

    def _description(self) -> str:
        ends = [
            f"{line.name} from {fixed(line.points[0][1], 3)} to {fixed(line.points[-1][1], 3)}" for line in self.lines
        ]
        references = [f"{name} at {fixed(y, 3)}" for name, y in self.references]
        return f"{self.y_label} against {self.x_label}. " + "; ".join(ends + references) + "."


class _Axis:
    """Maps data in [low, high], padded a little, to pixels in [start, end]."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False) -> None:
        self.start, self.end, self.log = start, end, log
        low, high = (self._in(min(values)), self._in(max(values)))
        pad = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
        self.low, self.high = low - pad, high + pad

    def _in(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._in(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most about `most` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    return [step * count for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten inside [low, high], with their multiples by 2 and 5 where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first < 4 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many decimals as their step needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1
    decimals = max(0, -math.floor(math.log10(step or 1) + 1e-9))
    return [fixed(tick + 0.0, decimals) for tick in ticks]


def spread(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points, evenly spaced, first and last kept."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _path(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis, css: str, dash: str = "") -> str:
    route = "L".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{css}"{dashes} d="M{route}"/>'


def _grid(y_axis: _Axis) -> str:
    ticks = log_ticks(10**y_axis.low, 10**y_axis.high) if y_axis.log else nice_ticks(y_axis.low, y_axis.high)
    labels = [f"{tick:g}" for tick in ticks] if y_axis.log else tick_labels(ticks)
    parts = []
    for tick, label in zip(ticks, labels, strict=True):
        y = y_axis(tick)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y:.1f}" dy=".35em" text-anchor="end">{label}</text>')
    return "".join(parts)


def _x_ticks(
    pixels: Sequence[float], labels: Sequence[str], left: float = LEFT, bottom: float = HEIGHT - BOTTOM
) -> str:
    parts = [f'<path class="axis" d="M{left},{bottom}H{WIDTH - RIGHT}"/>']
    for x, label in zip(pixels, labels, strict=True):
        parts.append(f'<path class="axis" d="M{x:.1f},{bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 8}" dy=".8em" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _axis_titles(x_label: str, y_label: str = "", left: float = LEFT, height: float = HEIGHT) -> str:
    middle = (left + WIDTH - RIGHT) / 2
    return (
        f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" x="2" y="16">{escape(y_label)}</text>'
    )


def _svg(id: str, title: str, description: str, parts: Sequence[str], height: float) -> Markup:
    return Markup(
        f'<svg role="img" viewBox="0 0 {WIDTH} {height}" aria-labelledby="{id}-title {id}-desc">'
        f'<title id="{id}-title">{escape(title)}</title><desc id="{id}-desc">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def legend(lines: Sequence[Line]) -> Markup:
    """The names of the lines, each with its colour, dash and marker."""
    items = []
    for line in lines:
        dash = DASHES[line.style % len(DASHES)]
        sample = (
            f'<svg viewBox="0 0 34 12" aria-hidden="true" class="{line.css}">'
            f'<path class="mean" stroke-dasharray="{dash}" d="M0,6H34"/>'
            f'<path d="{MARKERS[line.style % len(MARKERS)]}" transform="translate(17,6)"/></svg>'
        )
        items.append(f"<li>{sample} {escape(line.name)}</li>")
    return Markup(f'<ul class="legend">{"".join(items)}</ul>')


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
        y_axis = _Axis([0, *shares], HEIGHT - BOTTOM, TOP + 6)
        y_axis.low = 0.0
        # A histogram has a number at its left end, which the y axis' lowest one must not meet.
        left = LEFT + 12 if self.edges else LEFT
        slot = (WIDTH - RIGHT - left) / len(shares)
        middles = [left + slot * (i + 0.5) for i in range(len(shares))]
        every = math.ceil(len(shares) / 12)
        parts = [_grid(y_axis), _axis_titles(self.x_label, self.y_label)]
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
            parts.append(_x_ticks([left + scale * (tick - self.edges[0]) for tick in ticks], tick_labels(ticks)))
        else:
            parts.append(_x_ticks(middles, [escape(name) if i % every == 0 else "" for i, name in enumerate(names)]))
        text = "; ".join(f"{name}: {fixed(share, 1)} %" for name, share in zip(names, shares, strict=True))
        return _svg(self.id, self.title, f"{self.y_label} by {self.x_label}. {text}.", parts, HEIGHT)


def intervals(id: str, title: str, x_label: str, rows: Sequence[tuple[str, int, float, float, float]]) -> Markup:
    """Differences as dots with their intervals and a line at zero, one row (name, style, value, low, high) each."""
    # A kind's precision goes below its name: side by side they would not fit a phone's letters.
    left, step = 150, 44 if any("@" in row[0] for row in rows) else 30
    height = (bottom := TOP + step * len(rows)) + BOTTOM
    x_axis = _Axis([0.0, *(x for row in rows for x in row[2:])], left, WIDTH - RIGHT)
    ticks = nice_ticks(x_axis.low, x_axis.high)
    labels = [
        label if label.startswith("−") or not tick else f"+{label}"
        for tick, label in zip(ticks, tick_labels(ticks), strict=True)
    ]
    parts = [_x_ticks([x_axis(x) for x in ticks], labels, left, bottom), _axis_titles(x_label, "", left, height)]
    parts.append(f'<path class="reference" d="M{x_axis(0):.1f},{TOP - 8}V{bottom}"/>')
    for i, (name, style, value, low, high) in enumerate(rows):
        y = TOP + step * (i + 0.5)
        words = [word if len(word) <= 15 else f"{word[:14]}…" for word in name.replace("@", "\n@").split("\n")]
        spans = f'</tspan><tspan x="{left - 12}" dy="1em">'.join(map(escape, words))
        first = f'<tspan x="{left - 12}" dy="{0.35 - 0.5 * (len(words) - 1)}em">'
        parts.append(f'<text y="{y}" text-anchor="end">{first}{spans}</tspan></text>')
        parts.append(
            f'<g class="s{style % COLOURS}"><path class="mean" d="M{x_axis(low):.1f},{y}H{x_axis(high):.1f}"/>'
            f'<path d="{MARKERS[style % len(MARKERS)]}" transform="translate({x_axis(value):.1f},{y})"/></g>'
        )
    said = [f"{name} {fixed(v, 4, True)} [{fixed(a, 4, True)}, {fixed(b, 4, True)}]" for name, _, v, a, b in rows]
    return _svg(id, title, f"{x_label}: {'; '.join(said)}.", parts, height)
