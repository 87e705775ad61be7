"""A line chart, and the legend of its lines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparsemix.report.figures.axes import (
    BOTTOM,
    COLOURS,
    DASHES,
    HEIGHT,
    LEFT,
    MARKERS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Point,
    axis_titles,
    frame,
    grid,
    spread,
    tick_labels,
    x_ticks,
)
from sparsemix.report.numbers import Markup, escape, exponent, fixed

STAR = "M" + "L".join(
    f"{r * math.sin(k * math.pi / 5):.1f},{-r * math.cos(k * math.pi / 5):.1f}" for k, r in enumerate([8.5, 3.6] * 5)
)
Span = tuple[float, float]


class Star(NamedTuple):
    """An estimated point, drawn as a star, with the intervals of its x and y where they are known."""

    x: float
    y: float
    x_ci: Span | None = None
    y_ci: Span | None = None


@dataclass(frozen=True)
class Line:
    """One named line of a chart. `style` picks dash, marker and, unless given, colour; `thin` the runs behind it.

    path: what is drawn in place of the line through the points, such as a fit; () leaves the points alone.
    bars: the interval of each point's y."""

    name: str
    style: int
    points: Sequence[Point]
    thin: Sequence[Sequence[Point]] = ()
    ring: Point | None = None
    colour: int | None = None
    path: Sequence[Point] | None = None
    bars: Sequence[Span | None] = ()
    star: Star | None = None

    @property
    def css(self) -> str:
        """The CSS class of its colour."""
        return f"s{(self.style if self.colour is None else self.colour) % COLOURS}"

    def data(self) -> list[Point]:
        """Every point that must lie inside the frame."""
        star = [(self.star.x, self.star.y)] if self.star else []
        return [point for part in (self.points, *self.thin, self.path or (), star) for point in part]


@dataclass(frozen=True)
class Chart:
    """A line chart over `lines`. `x_scale` divides what the x axis prints; `references` are horizontal lines,
    `x_references` vertical ones; without a name they have no label. A reference far outside the lines would flatten
    them, so it is left out and listed by `outside`. `y_span` is the least that the y axis shows, for charts that are to
    be compared; `x_text` and `y_text` print values of logarithmic axes."""

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
    x_references: Sequence[tuple[str, float]] = ()
    y_span: Span | None = None
    x_text: Callable[[float], str] = exponent
    y_text: Callable[[float], str] | None = None

    def _y_data(self) -> list[float]:
        return [*(y for line in self.lines for _, y in line.data()), *(self.y_span or ())]

    def _inside(self) -> list[tuple[str, float]]:
        low, high = min(self._y_data()), max(self._y_data())
        slack = 0.35 * ((high - low) or abs(high) or 1)
        return [(name, y) for name, y in self.references if low - slack <= y <= high + slack]

    def outside(self) -> list[tuple[str, float]]:
        """The references that the chart does not show."""
        return [reference for reference in self.references if reference not in self._inside()]

    def axes(self) -> tuple[Axis, Axis]:
        """x and y. Intervals widen them, but by no more than half of what the points span."""
        stars = [line.star for line in self.lines if line.star]
        xs = [*(x for line in self.lines for x, _ in line.data()), *(x for _, x in self.x_references)]
        xs += _near(xs, [end for star in stars for end in star.x_ci or ()], self.log_x)
        ys = [*self._y_data(), *(y for _, y in self._inside()), *([0.0] if self.y_zero else [])]
        bars = [end for line in self.lines for bar in line.bars for end in bar or ()]
        ys += _near(ys, [*bars, *(end for star in stars for end in star.y_ci or ())], self.log_y)
        x_axis, y_axis = Axis(xs, LEFT, WIDTH - RIGHT, self.log_x), Axis(ys, HEIGHT - BOTTOM, TOP, self.log_y)
        if self.y_zero:
            y_axis.low = 0.0
        return x_axis, y_axis

    def svg(self) -> Markup:
        """The chart as an <svg>. Needs at least one point."""
        x_axis, y_axis = self.axes()
        y_text = self.y_text or ((lambda y: f"{y:g}") if self.log_y else None)
        parts = [self._x_ticks(x_axis), grid(y_axis, y_text), axis_titles(self.x_label, self.y_label)]
        parts += [f'<path class="reference" d="M{LEFT},{y_axis(y):.1f}H{WIDTH - RIGHT}"/>' for _, y in self._inside()]
        for _, x in self.x_references:
            parts.append(f'<path class="reference" d="M{x_axis(x):.1f},{TOP}V{HEIGHT - BOTTOM}"/>')
        parts += [f'<g class="{line.css}">{self._line(line, x_axis, y_axis)}</g>' for line in self.lines]
        for name, y in filter(lambda reference: reference[0], self._inside()):
            label = f"{escape(name)} {fixed(y, 2)}"
            parts.append(
                f'<text class="halo" x="{WIDTH - RIGHT - 2}" y="{y_axis(y) - 5:.1f}" text-anchor="end">{label}</text>'
            )
        return frame(self.id, self.title, self._description(), parts, HEIGHT)

    def _x_ticks(self, x_axis: Axis) -> str:
        if self.log_x:
            ticks = self.x_ticks or x_axis.ticks(6)
            return x_ticks([x_axis(x) for x in ticks], [escape(self.x_text(x)) for x in ticks])
        scaled = Axis([0, 1], 0, 1)
        scaled.low, scaled.high = x_axis.low / self.x_scale, x_axis.high / self.x_scale
        ticks = self.x_ticks or [tick * self.x_scale for tick in scaled.ticks()]
        return x_ticks([x_axis(x) for x in ticks], tick_labels([x / self.x_scale for x in ticks]))

    def _line(self, line: Line, x_axis: Axis, y_axis: Axis) -> str:
        paths = [_path(part, x_axis, y_axis, "thin") for part in line.thin if len(part) > 1]
        route = line.points if line.path is None else line.path
        if route:
            paths.append(_path(route, x_axis, y_axis, "mean", DASHES[line.style % len(DASHES)]))
        for (x, _), bar in zip(line.points, line.bars, strict=False):
            paths += [_bar(bar, x, x_axis, y_axis, upright=True)] if bar else []
        shown = line.points if line.path is not None or line.bars else spread(line.points, 9)
        paths += [self._marker(line, point, x_axis, y_axis) for point in shown]
        if line.ring:
            x, y = line.ring
            paths.append(f'<circle class="ring" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="8"/>')
        if star := line.star:
            paths += [_bar(star.x_ci, star.y, x_axis, y_axis, upright=False)] if star.x_ci else []
            paths += [_bar(star.y_ci, star.x, x_axis, y_axis, upright=True)] if star.y_ci else []
            tip = f"<title>{escape(self._star(line.name, star))}</title>"
            place = f"translate({x_axis(star.x):.1f},{y_axis(star.y):.1f})"
            paths.append(f'<path class="star" d="{STAR}z" transform="{place}">{tip}</path>')
        return "".join(paths)

    def _marker(self, line: Line, point: Point, x_axis: Axis, y_axis: Axis) -> str:
        x, y = point
        tip = f"<title>{escape(line.name)}: {escape(self._y(y, 4))} at {escape(self._x(x))}</title>"
        shape = MARKERS[line.style % len(MARKERS)]
        return f'<path d="{shape}" transform="translate({x_axis(x):.1f},{y_axis(y):.1f})">{tip}</path>'

    def _x(self, x: float) -> str:
        return self.x_text(x) if self.log_x else fixed(x / self.x_scale, 3)

    def _y(self, y: float, decimals: int) -> str:
        return self.y_text(y) if self.y_text else fixed(y, decimals)

    def _star(self, name: str, star: Star) -> str:
        where = f" [{self._x(star.x_ci[0])}, {self._x(star.x_ci[1])}]" if star.x_ci else ""
        return f"{name}: optimum {self._y(star.y, 4)} at {self._x(star.x)}{where}"

    def _description(self) -> str:
        ends = [
            f"{line.name} from {self._y(line.points[0][1], 3)} to {self._y(line.points[-1][1], 3)}"
            for line in self.lines
            if line.points
        ]
        stars = [self._star(line.name, line.star) for line in self.lines if line.star]
        references = [f"{name or 'a line'} at {fixed(y, 3)}" for name, y in self.references]
        return f"{self.y_label} against {self.x_label}. " + "; ".join(ends + stars + references) + "."

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) of everything that is drawn; what is `single` is one run behind a mean."""
        columns = ["series", "what", "x", "y", "x_low", "x_high", "y_low", "y_high"]
        rows: list[list[Any]] = []
        for line in self.lines:
            bars = [*line.bars, *[None] * (len(line.points) - len(line.bars))]
            rows += [
                [line.name, "point", x, y, None, None, *(bar or (None, None))]
                for (x, y), bar in zip(line.points, bars, strict=True)
            ]
            parts = [("single", part) for part in line.thin] + [("fit", line.path or ())]
            rows += [[line.name, what, x, y, *[None] * 4] for what, part in parts for x, y in part]
            if s := line.star:
                rows.append([line.name, "optimum", s.x, s.y, *(s.x_ci or (None, None)), *(s.y_ci or (None, None))])
        rows += [[name, "reference", None, y, *[None] * 4] for name, y in self.references]
        rows += [[name, "reference", x, None, *[None] * 4] for name, x in self.x_references]
        return columns, rows


def _near(values: Sequence[float], ends: Sequence[float], log: bool) -> list[float]:
    """The ends of intervals, each brought to within half of the span of the values."""
    inner = [math.log10(value) for value in values] if log else list(values)
    slack = 0.5 * (max(inner) - min(inner)) or (0.5 if log else 0.5 * abs(inner[0]) or 1)
    low, high = min(inner) - slack, max(inner) + slack
    known = [end for end in ends if not math.isnan(end)]
    if log:
        return [10 ** min(max(math.log10(end) if end > 0 else low, low), high) for end in known]
    return [min(max(end, low), high) for end in known]


def _path(points: Sequence[Point], x_axis: Axis, y_axis: Axis, css: str, dash: str = "") -> str:
    route = "L".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{css}"{dashes} d="M{route}"/>'


def _bar(ends: Span, at: float, x_axis: Axis, y_axis: Axis, upright: bool) -> str:
    """An interval with a stroke across each end that lies inside the frame."""
    axis, across = (y_axis, x_axis(at)) if upright else (x_axis, y_axis(at))
    edge = sorted((axis.start, axis.end))
    places = []
    for end in ends:
        beyond = axis.end if end > 0 or not axis.log else axis.start
        place = axis(end) if math.isfinite(end) and (end > 0 or not axis.log) else beyond
        places.append((min(max(place, edge[0]), edge[1]), edge[0] <= place <= edge[1]))
    (a, _), (b, _) = places
    route = f"M{across:.1f},{a:.1f}V{b:.1f}" if upright else f"M{a:.1f},{across:.1f}H{b:.1f}"
    for place, inside in places:
        if inside:
            route += f"M{across - 4:.1f},{place:.1f}h8" if upright else f"M{place:.1f},{across - 4:.1f}v8"
    return f'<path class="bar-line" d="{route}"/>'


def legend(lines: Sequence[Line]) -> Markup:
    """The names of the lines, each with its colour, dash and marker."""
    items = [f"<li>{sample(line)} {escape(line.name)}</li>" for line in lines]
    return Markup(f'<ul class="legend">{"".join(items)}</ul>')


def sample(line: Line) -> str:
    """A piece of the line, 34 x 12, as legends show it."""
    dash = DASHES[line.style % len(DASHES)]
    return (
        f'<svg viewBox="0 0 34 12" aria-hidden="true" class="{line.css}">'
        f'<path class="mean" stroke-dasharray="{dash}" d="M0,6H34"/>'
        f'<path d="{MARKERS[line.style % len(MARKERS)]}" transform="translate(17,6)"/></svg>'
    )
