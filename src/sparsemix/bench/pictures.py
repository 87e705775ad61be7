"""The two figures of the page on performance."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sparsemix.bench.tables import time
from sparsemix.report.palette import LIGHT

INK, MET, MISSED = LIGHT["c0"], LIGHT["c3"], LIGHT["c2"]


def svg(figure: Figure) -> bytes:
    """The same figure gives the same bytes: no date, no random names, letters as letters."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparsemix", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    lines = stream.getvalue().decode().splitlines()
    return ("\n".join(line.rstrip() for line in lines) + "\n").encode()


def over_floor(row: dict[str, Any], value: float) -> float:
    """`value` in units of the floor, so that 1 just meets it and more is better."""
    return row["floor"] / value if row["at_most"] else value / row["floor"]


def floors(rows: Sequence[dict[str, Any]]) -> bytes:
    """A bar a number, in units of its floor, and its goal as a mark."""
    figure = Figure(figsize=(7.5, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    shares = [over_floor(row, row["value"]) for row in rows]
    axes.barh(places, shares, 0.62, color=[MET if row["met"] else MISSED for row in rows])
    goals = [(over_floor(row, row["goal"]), i) for i, row in enumerate(rows) if row["goal"]]
    for i, row in enumerate(rows):
        # Beside the bar and its goal.
        end = max([shares[i], *(goal for goal, place in goals if place == i)])
        axes.annotate(
            f"{row['value']:.3g}", (end, i), (5, 0), textcoords="offset points", va="center", fontsize="small"
        )
    if goals:
        axes.plot(*zip(*goals, strict=True), "D", color=INK, ms=4, ls="none", label="goal")
        axes.legend(frameon=False, fontsize="small", loc="lower right")
    axes.axvline(1, color=INK, lw=1)
    axes.set_yticks(places, [row["id"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = min(0.5, *shares) * 0.9, max(2.0, *shares, *(x for x, _ in goals)) * 1.4
    ticks = [2.0**power for power in range(-6, 7) if low <= 2.0**power <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.set_xlabel("in units of the floor (1 meets it); the number is the value itself")
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def growth(cases: Sequence[dict[str, Any]]) -> bytes:
    """Time of a step over each size, beside the formula through the first point."""
    figure = Figure(figsize=(7.5, 5.6), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, case in zip(panels, cases, strict=False):
        rows = {size: row for size, row in case["contenders"].items() if "min_s" in row}
        sizes = [row["size"] for row in rows.values()]
        seconds = [row["min_s"] for row in rows.values()]
        formula = [row["formula"] for row in rows.values()]
        wanted = [seconds[0] * f / formula[0] for f in formula] if rows else []
        axes.plot(sizes, wanted, "--", color=LIGHT["c7"], label="its formula")
        axes.plot(sizes, seconds, "o-", color=LIGHT["c1"], label="measured")
        axes.set(title=case["name"], xscale="log", yscale="log")
        axes.set_xticks(sizes, list(rows))
        # A label that would cover the one below it is left out.
        marks = [second for i, second in enumerate(seconds) if all(second > 1.15 * s for s in seconds[:i])]
        axes.set_yticks(marks, [time(second) for second in marks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        if case is cases[0]:
            axes.legend(frameon=False, fontsize="small")
    return svg(figure)
