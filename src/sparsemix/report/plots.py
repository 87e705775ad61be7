"""The figures of a comparison: losses, learning rates, differences, passes and expert load, with their captions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsemix.report.figures import Bars, Chart, Dots, Line, Point, legend
from sparsemix.report.numbers import DASH, PREFIXES, Markup, escape, fixed, is_number, prefix_power, si
from sparsemix.report.tables import BASELINES, ranked


def figure(svg: str, caption: str, key: str = "") -> Markup:
    """A chart with its caption, and its legend `key` above."""
    return Markup(f"<figure>{key}{svg}<figcaption>{escape(caption)}</figcaption></figure>")


def styles_of(result: dict[str, Any]) -> dict[str, int]:
    """The style of each kind, the same in every chart; dense is 0."""
    others = [row.get("kind") for row in result.get("rows") or [] if row.get("kind") != "dense"]
    return {"dense": 0, **{str(kind): i for i, kind in enumerate(others, start=1)}}


def differences(result: dict[str, Any]) -> Markup:
    """Difference from dense per kind with its interval; empty if no kind has one."""
    styles = styles_of(result)
    rows = [
        (str(row.get("kind")), styles[str(row.get("kind"))], row["difference"], *row["difference_ci"])
        for row in ranked(result)
        if is_number(row.get("difference")) and all(map(is_number, row.get("difference_ci") or [None]))
    ]
    if not rows:
        return Markup("")
    dots = Dots("differences", "Difference from dense", "difference from dense (bits per byte)", rows)
    return figure(
        dots.svg(), "Difference from dense with its 95\u00a0% confidence interval; left of zero is better than dense."
    )


def _points(run: dict[str, Any], key: str) -> list[Point]:
    curve = run.get("curve") or []
    return sorted((at[key], at["bpb"]) for at in curve if is_number(at.get(key)) and is_number(at.get("bpb")))


def mean_line(name: str, style: int, curves: Sequence[Sequence[Point]]) -> Line | None:
    """The mean of the curves over the stretch that all of them cover, with the curves as thin lines; None if empty."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    start, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    grid = sorted({x for curve in curves for x, _ in curve if start <= x <= end})
    if not grid:
        return None
    values = [np.interp(grid, [x for x, _ in curve], [y for _, y in curve]) for curve in curves]
    means = [(x, float(y)) for x, y in zip(grid, np.mean(values, axis=0), strict=True)]
    return Line(name, style, means, curves if len(curves) > 1 else ())


def _later(line: Line, x: float) -> Line | None:
    parts = [[point for point in part if point[0] >= x] for part in (line.points, *line.thin)]
    return Line(line.name, line.style, parts[0], parts[1:]) if parts[0] else None


def losses(result: dict[str, Any], key: str) -> Markup:
    """Validation loss against `key` (flops or wall_s), the whole and its later part, with the n-gram baselines."""
    styles = styles_of(result)
    found = [
        mean_line(
            str(row.get("kind")), styles[str(row.get("kind"))], [_points(run, key) for run in row.get("runs") or []]
        )
        for row in result.get("rows") or []
    ]
    lines = [line for line in found if line]
    if not lines:
        return Markup(f"<p>{DASH} (no loss was recorded during training)</p>")
    most = max(line.points[-1][0] for line in lines)
    scale, label = 1000.0 ** prefix_power(most), f"training compute ({PREFIXES[prefix_power(most)]}FLOP)"
    if key == "wall_s":
        scale, unit = (3600.0, "h") if most > 7200 else (60.0, "min") if most > 300 else (1.0, "s")
        label = f"wall-clock time ({unit})"
    known = result.get("baselines") or {}
    references = [(name, known[k]) for k, name in BASELINES[1:] if is_number(known.get(k))]
    what = "Validation loss against " + ("training compute" if key == "flops" else "wall-clock time")
    chart = Chart(f"{key}-all", what, label, "validation bits per byte", lines, references, scale)
    outside = ", ".join(f"{name} {fixed(y, 2)}" for name, y in chart.outside())
    caption = f"{what}: the mean of each kind over its seeds; thin lines are single runs. Dotted: baselines" + (
        f" (beyond the frame: {outside})." if outside else "."
    )
    figures = [figure(chart.svg(), caption, legend(lines))]
    half = min(line.points[-1][0] for line in lines) / 2
    late = [line for line in (_later(line, half) for line in lines) if line]
    if late:
        zoom = Chart(f"{key}-late", f"{what}, later part", label, "validation bits per byte", late, references, scale)
        figures.append(figure(zoom.svg(), "The same, enlarged, from half of the shortest run on."))
    return Markup("".join(figures))


def learning_rates(result: dict[str, Any]) -> Markup:
    """Validation loss against learning rate per kind, the best one ringed; empty if nothing was swept."""
    styles, lines = styles_of(result), []
    for kind, tried in (result.get("lr_sweep") or {}).items():
        points = sorted(
            (at["lr"], at["validation_bpb"])
            for at in tried or []
            if is_number(at.get("lr")) and at["lr"] > 0 and is_number(at.get("validation_bpb"))
        )
        if points:
            lines.append(
                Line(kind, styles.get(kind, len(styles)), points, ring=min(points, key=lambda point: point[1]))
            )
    if not lines:
        return Markup("")
    ticks = sorted({x for line in lines for x, _ in line.points})
    ticks = ticks[:: -(-len(ticks) // 7)]
    chart = Chart(
        "sweep", "Learning-rate sweep", "learning rate", "validation bits per byte", lines, log_x=True, x_ticks=ticks
    )
    edge = [line.name for line in lines if line.ring in (line.points[0], line.points[-1]) and len(line.points) > 1]
    caption = "Validation loss after training with each learning rate; the ring marks the best." + (
        f" At the edge of its sweep, so perhaps not yet the best: {', '.join(edge)}." if edge else ""
    )
    return figure(chart.svg(), caption, legend(lines))


def passes(row: dict[str, Any], id: str, style: int) -> Markup:
    """Tokens by the number of routed blocks that processed them; empty for kinds that skip nothing."""
    counts = (row.get("routing") or {}).get("passes")
    if not counts:
        return Markup("")
    title = f"{row.get('kind')}: tokens by number of routed blocks"
    svg = Bars(id, title, "routed blocks that processed the token", counts, style).svg()
    blocks = len(counts) - 1
    text = f"{row.get('kind')}: how many of its {blocks} routed blocks processed a token ({si(sum(counts))} tokens)."
    return figure(svg, text)


def loads(row: dict[str, Any], id: str, style: int) -> Markup:
    """Sorted expert load per layer of one kind, relative to an even load; empty for kinds without experts."""
    chart = load_chart((row.get("routing") or {}).get("experts") or {}, id, str(row.get("kind")), style)
    return figure(chart.svg(), load_caption(chart), legend(chart.lines)) if chart else Markup("")


def load_chart(experts: dict[str, Any], id: str, name: str, style: int) -> Chart | None:
    """The sorted load of every layer's experts, relative to an even load; None without any load."""
    curves: dict[str, list[Point]] = {}
    for layer, seen in experts.items():
        load = seen.get("load") or []
        if sum(load) > 0:
            even = sum(load) / len(load)
            curves[layer] = [(100 * (j + 0.5) / len(load), share / even) for j, share in enumerate(load)]
    if not curves:
        return None
    # A few experts with far more than their share would flatten all others on a linear axis.
    log = max(y for points in curves.values() for _, y in points) > 10
    lines = [
        Line(layer, i, [point for point in points if point[1] > 0 or not log], colour=style)
        for i, (layer, points) in enumerate(curves.items())
    ]
    title = f"{name}: load of the experts, sorted"
    x_label, y_label = "experts, busiest first (%)", "load relative to even"
    return Chart(id, title, x_label, y_label, lines, [("even", 1.0)], y_zero=not log, log_y=log)


def load_caption(chart: Chart) -> str:
    """What a chart of `load_chart` shows."""
    name = chart.title.partition(":")[0]
    return f"{name}: sorted load of the experts in each layer; 1 is an even load." + (
        " Logarithmic; experts without a token are not drawn." if chart.log_y else ""
    )
