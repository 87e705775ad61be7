"""A figure of the page as a PNG."""

import io
from itertools import zip_longest

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sparsemix.report.figures import Bars, Chart, Dots, HeatMap, Line, Shape
from sparsemix.report.figures.axes import COLOURS
from sparsemix.report.figures.chart import Span
from sparsemix.report.numbers import fixed
from sparsemix.report.palette import LIGHT

# By style, as the page's markers and dashes are.
MARKERS = "os^DvPp"
DASHES = ("-", "--", ":", "-.", (0, (8, 3)))


def png(shape: Shape) -> bytes:
    """The chart or the bars, 1120 x 640 pixels; dots as high as they are many."""
    height = 0.35 * len(shape.points) + 1.2 if isinstance(shape, Dots) else 4.0
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    axes.set(title=shape.title, xlabel=shape.x_label)
    if isinstance(shape, Chart):
        _chart(axes, shape)
    elif isinstance(shape, Bars):
        _bars(axes, shape)
    elif isinstance(shape, HeatMap):
        _heat_map(axes, shape)
    else:
        _dots(axes, shape)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=160, format="png")
    return stream.getvalue()


def _colour(style: int) -> str:
    return LIGHT[f"c{style % COLOURS}"]


def _chart(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        _line(axes, line)
    for name, y in chart.references:
        axes.axhline(y, color="0.5", lw=0.8, ls=":", label=name or None)
    for _, x in chart.x_references:
        axes.axvline(x, color="0.5", lw=0.8, ls=":")
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    x_axis, y_axis = chart.axes()
    for axis, limit in ((x_axis, axes.set_xlim), (y_axis, axes.set_ylim)):
        limit(*(10**end if axis.log else end for end in (axis.low, axis.high)))
    axes.set(ylabel=chart.y_label)
    if chart.log_x:
        axes.set_xticks(chart.x_ticks or x_axis.ticks(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: chart.x_text(x)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / chart.x_scale:g}"))
    if chart.log_y:
        axes.set_yticks(y_axis.ticks())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: (chart.y_text or "{:g}".format)(y)))
        axes.yaxis.set_minor_locator(NullLocator())
    if len(chart.lines) > 1 or any(name for name, _ in chart.references):
        axes.legend(frameon=False, fontsize="small")


def _line(axes: Axes, line: Line) -> None:
    colour = _colour(line.style if line.colour is None else line.colour)
    dash, marker = DASHES[line.style % len(DASHES)], MARKERS[line.style % len(MARKERS)]
    for part in line.thin:
        axes.plot(*zip(*part, strict=True), color=colour, lw=0.6, alpha=0.45)
    xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
    if line.path is None:
        axes.plot(xs, ys, ls=dash, marker=marker, ms=4.5, markevery=max(1, len(xs) // 9), color=colour, label=line.name)
    else:
        axes.plot(xs, ys, ls="", marker=marker, ms=4.5, color=colour)
        axes.plot([x for x, _ in line.path], [y for _, y in line.path], ls=dash, color=colour)
        axes.plot([], [], ls=dash if line.path else "", marker=marker, ms=4.5, color=colour, label=line.name)
    for (x, y), bar in zip_longest(line.points, line.bars):
        if bar:
            _interval(axes, x, y, None, bar, colour)
    if star := line.star:
        _interval(axes, star.x, star.y, star.x_ci, star.y_ci, colour)
        axes.plot([star.x], [star.y], marker="*", ms=15, color=colour, mec="white", zorder=5)


def _interval(axes: Axes, x: float, y: float, x_ci: Span | None, y_ci: Span | None, colour: str) -> None:
    if x_ci:
        axes.plot(x_ci, (y, y), color=colour, lw=1.2, marker="|", ms=7)
    if y_ci:
        axes.plot((x, x), y_ci, color=colour, lw=1.2, marker="_", ms=7)


def _bars(axes: Axes, bars: Bars) -> None:
    colour, shares = _colour(bars.style), bars.shares()
    if bars.edges:
        axes.stairs(shares, bars.edges, fill=True, color=colour)
    else:
        drawn = axes.bar(bars.called(), shares, color=colour)
        axes.bar_label(drawn, [fixed(share, 1) for share in shares], fontsize="small")
    axes.set(ylabel=bars.y_label)
    axes.set_ylim(bottom=0)


def _heat_map(axes: Axes, heat: HeatMap) -> None:
    ramp = LinearSegmentedColormap.from_list("shares", [LIGHT["ground"], _colour(heat.style)])
    edges = range(len(heat.names) + 1)
    axes.pcolormesh(heat.edges, edges, heat.values, cmap=ramp, vmin=0, vmax=1, edgecolors=LIGHT["faint"], lw=0.2)
    axes.set_yticks([row + 0.5 for row in edges[:-1]], heat.names)
    axes.set(ylabel=heat.y_label)


def _dots(axes: Axes, dots: Dots) -> None:
    axes.axvline(0, color="0.5", lw=0.8, ls=":")
    for i, (_, style, value, low, high) in enumerate(dots.points):
        axes.plot((low, high), (i, i), color=_colour(style))
        axes.plot([value], [i], marker=MARKERS[style % len(MARKERS)], color=_colour(style))
    axes.set_yticks(range(len(dots.points)), [row[0] for row in dots.points])
    axes.invert_yaxis()
