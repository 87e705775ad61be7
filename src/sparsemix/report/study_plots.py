"""The figures of an isoFLOP study: curves with their optima, optimum against budget, relative loss, gaps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsemix.report.figures import Chart, Dots, Line, Point, Shape, Star
from sparsemix.report.figures.chart import Span
from sparsemix.report.numbers import PREFIXES, exponent, fixed, interval, is_number, prefix_power

Analysis = dict[str, Any]
LOSS = "test loss (nats per token)"


class Captioned(NamedTuple):
    """A figure with its caption."""

    shape: Shape
    caption: str


class Size(NamedTuple):
    """What a model's size is measured in: its key in the analysis, and in words."""

    key: str
    label: str


SIZES = (
    Size("params", "parameters"),
    Size("active_params", "active parameters"),
    Size("forward_flops", "forward FLOPs per token"),
)


def short(value: float) -> str:
    """'1.5M': a size, as short as its ticks allow."""
    power = prefix_power(value)
    return f"{float(f'{value:.3g}') / 1000**power:.3g}{PREFIXES[power]}"


def flops(budget: float) -> str:
    """'3e13 FLOPs'."""
    return f"{exponent(budget)} FLOPs"


def styles(analysis: Analysis) -> dict[str, int]:
    """The style of each arm, the same in every chart."""
    return {arm: i for i, arm in enumerate(analysis["arms"])}


def sizes_known(analysis: Analysis) -> list[Size]:
    """The sizes that every point has."""
    points = [point for curve in analysis["curves"] for point in curve["points"]]
    return [size for size in SIZES if points and all(is_number(point.get(size.key)) for point in points)]


def isoflop(analysis: Analysis, size: Size) -> list[Captioned]:
    """Loss against size, a chart an arm, a line a budget; every run a marker, the optimum a star."""
    losses = [nats for curve in analysis["curves"] for point in curve["points"] for nats in point["seeds"]]
    losses = [nats for nats in losses if is_number(nats)]
    drawn = []
    for arm in analysis["arms"]:
        lines, unlike = [], False
        for i, budget in enumerate(analysis["budgets"]):
            curve = next((c for c in analysis["curves"] if (c["arm"], c["budget"]) == (arm, budget)), None)
            if curve and (line := _isoflop_line(curve, size, i + 1)):
                lines.append(line)
                unlike |= bool(curve.get("quadratic")) and not line.path
        if lines:
            chart = Chart(
                f"isoflop-{slug(arm)}-{size.key.replace('_', '-')}", f"{arm}: loss against {size.label}", size.label,
                LOSS, lines, log_x=True, x_text=short, y_span=(min(losses), max(losses)),
            )  # fmt: skip
            note = f" The fit is no curve here, as {size.label} do not grow with the FLOPs." if unlike else ""
            drawn.append(Captioned(chart, f"{arm}. {_optima_said(analysis, arm)}{note}"))
    return drawn


def _optima_said(analysis: Analysis, arm: str) -> str:
    said = []
    for curve in analysis["curves"]:
        if curve["arm"] == arm:
            best = curve.get("optimum")
            found = f"{short(best['params'])} parameters" if best else curve.get("said") or "no optimum"
            said.append(f"{flops(curve['budget'])}: {found}")
    return "; ".join(said) + "."


def _isoflop_line(curve: dict[str, Any], size: Size, style: int) -> Line | None:
    points = sorted(curve["points"], key=lambda point: point["forward_flops"])
    runs = [(point[size.key], nats) for point in points for nats in point["seeds"] if is_number(nats)]
    if not runs:
        return None
    known, other = (np.log10([point[key] for point in points]) for key in ("forward_flops", size.key))

    def there(forward_flops: float) -> float:
        # Between two sizes of the grid every measure of size grows evenly, in logarithms.
        return float(10 ** np.interp(np.log10(forward_flops), known, other))

    # A fit over FLOPs is no curve over a size that does not grow with them (a table's rows may shrink).
    grows = bool((np.diff(other) > 0).all())
    path: list[Point] = []
    if (q := curve.get("quadratic")) and grows:
        x = np.linspace(known[0], known[-1], 41) - curve["centre"]
        values = q["a"] + q["b"] * x + q["c"] * x**2
        path = [(there(10 ** (at + curve["centre"])), float(y)) for at, y in zip(x, values, strict=True)]
    star = None
    own = size.key in (curve.get("optimum") or ())
    if (best := curve.get("optimum")) and (own or grows):
        ends = span(best.get("forward_flops_ci"))
        star = Star(
            best[size.key] if own else there(best["forward_flops"]), best["nats"],
            span(best.get(f"{size.key}_ci")) if own else ends and (there(ends[0]), there(ends[1])),
            span(best.get("nats_ci")),
        )  # fmt: skip
    return Line(flops(curve["budget"]), style, runs, path=path, star=star)


def span(ends: Any) -> Span | None:
    """An interval of the analysis, None where either end is not known."""
    return (ends[0], ends[1]) if ends and all(end is not None for end in ends) else None


def optimum_against_budget(analysis: Analysis) -> Captioned | None:
    """The optimal size of each arm over the budget, with its intervals and power law."""
    lines, style, said = [], styles(analysis), []
    for entry in analysis["optimum_against_budget"]:
        found = [point for point in entry["points"] if is_number(point[1])]
        points = [(budget, params) for budget, params, *_ in found]
        bars = [span(ends) for _, _, *ends in found]
        if not points:
            continue
        name = entry["arm"]
        if is_number(entry.get("exponent")):
            said.append(f"{name} C^{fixed(entry['exponent'], 2)} {interval(entry.get('exponent_ci'), 2)}")
        path = _power_law(points, entry["exponent"]) if is_number(entry.get("exponent")) else ()
        lines.append(Line(name, style[name], points, bars=bars, path=path))
    if not lines:
        return None
    budgets = analysis["budgets"][:: -(-len(analysis["budgets"]) // 6)]
    chart = Chart(
        "optimum-against-budget", "Optimal size against budget", "training FLOPs", "optimal parameters", lines,
        log_x=True, log_y=True, x_text=exponent, y_text=short, x_ticks=budgets,
    )  # fmt: skip
    law = f" Power laws through them: {'; '.join(said)}." if said else " One budget: no power law."
    return Captioned(chart, f"Optimal parameters with their 95\u00a0% intervals.{law}")


def _power_law(points: Sequence[Point], power: float) -> list[Point]:
    """N = k C^power through the points' mean in logarithms."""
    logs = np.log10(points)
    offset = float((logs[:, 1] - power * logs[:, 0]).mean())
    return [(c, 10 ** (offset + power * np.log10(c))) for c, _ in (points[0], points[-1])]


def overlays(analysis: Analysis) -> list[Captioned]:
    """Loss over the baseline's optimal loss against forward FLOPs over its optimal ones, a chart a budget."""
    drawn, style, base = [], styles(analysis), analysis["baseline"]
    for budget in analysis["budgets"]:
        curves = [c for c in analysis["curves"] if c["budget"] == budget]
        best = next((c.get("optimum") for c in curves if c["arm"] == base), None)
        if not best:
            continue
        lines = []
        for curve in curves:
            points = sorted(
                (p["forward_flops"] / best["forward_flops"], p["nats"] / best["nats"]) for p in curve["points"]
            )
            own = curve.get("optimum")
            star = Star(own["forward_flops"] / best["forward_flops"], own["nats"] / best["nats"]) if own else None
            lines.append(Line(curve["arm"], style[curve["arm"]], points, star=star))
        chart = Chart(
            f"overlay-{budget:.3g}".replace("+", ""), f"Relative loss at {flops(budget)}",
            f"forward FLOPs per token over those of {base}'s optimum", f"loss over {base}'s optimal loss", lines,
            [("", 1.0)], log_x=True, x_text=lambda x: f"{x:.2g}", x_references=[("", 1.0)],
        )  # fmt: skip
        text = (
            f"{flops(budget)}: means of the seeds, a point a size; stars are fitted optima. Dotted: {base}'s optimum; "
            "what lies below is better."
        )
        drawn.append(Captioned(chart, text))
    return drawn


def gaps(analysis: Analysis) -> Captioned | None:
    """Loss at each arm's optimum minus the baseline's, with its interval."""
    style, several = styles(analysis), len(analysis["budgets"]) > 1
    rows = [
        (
            f"{q['arm']}, {exponent(q['budget'])}" if several else q["arm"],
            style[q["arm"]],
            q["gap_nats"],
            *q["gap_nats_ci"],
        )
        for q in analysis["quantities"]
        if is_number(q.get("gap_nats")) and span(q.get("gap_nats_ci"))
    ]
    if not rows:
        return None
    base = analysis["baseline"]
    dots = Dots("gaps", f"Loss next to the optimum, less {base}'s", f"nats per token, less {base}'s", rows)
    return Captioned(
        dots, f"Loss of the size next to the optimum minus {base}'s, with 95\u00a0% intervals; left is better."
    )


def slug(arm: str) -> str:
    """The arm's name as a part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in arm)
