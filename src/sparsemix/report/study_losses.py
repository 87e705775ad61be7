"""Losses of an isoFLOP study as training went on: against seconds, and against the FLOPs spent."""

from collections import defaultdict
from typing import Any

from sparsemix.report.figures import Chart, Line
from sparsemix.report.numbers import exponent, is_number
from sparsemix.report.optimum import FITTED
from sparsemix.report.plots import mean_line
from sparsemix.report.study_plots import Analysis, Captioned, flops, styles


def against_time(analysis: Analysis) -> list[Captioned]:
    """Validation loss against seconds of the runs that stand for each arm, a chart a budget."""
    drawn, style = [], styles(analysis)
    for budget in analysis["budgets"]:
        lines = []
        for arm in analysis["arms"]:
            runs = runs_at_optimum(analysis, arm, budget)
            curves = [sorted((wall, bpb) for _, wall, bpb in run["curve"] if is_number(bpb)) for run in runs]
            if line := mean_line(arm, style[arm], curves):
                lines.append(line)
        if lines:
            most = max(line.points[-1][0] for line in lines)
            scale, unit = (3600.0, "h") if most > 7200 else (60.0, "min") if most > 300 else (1.0, "s")
            chart = Chart(
                f"time-{budget:.3g}".replace("+", ""), f"Loss against time at {flops(budget)}",
                f"wall-clock time ({unit})", "validation bits per byte", lines, x_scale=scale,
            )  # fmt: skip
            text = (
                f"{flops(budget)}: the runs next to each optimum, which verdicts rest on, mean over seeds "
                "(thin: single runs)."
            )
            drawn.append(Captioned(chart, text))
    return drawn


def runs_at_optimum(analysis: Analysis, arm: str, budget: float) -> list[dict[str, Any]]:
    """The entries of the runs that stand for the arm at the budget, which its verdict rests on too; none without a
    curve."""
    curve = next((c for c in analysis["curves"] if (c["arm"], c["budget"]) == (arm, budget)), None)
    if curve is None:
        return []
    # A folder's name alone may be of two studies.
    found = {r["seed"]: r for r in reversed(analysis["runs"]) if _stands(r, curve)}
    return [found[seed] for seed in sorted(found)]


def _stands(run: dict[str, Any], curve: dict[str, Any]) -> bool:
    """Whether the run is one of those that stand for the curve."""
    same = all(run[key] == curve[key] for key in ("arm", "budget")) and run["role"] in FITTED
    return same and run["folder"] in curve["standing"]["folders"]


def largest_optima(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """Of every arm the first run at its optimum of the largest budget that has one."""
    shown = {}
    for arm in analysis["arms"]:
        for budget in reversed(analysis["budgets"]):
            if runs := runs_at_optimum(analysis, arm, budget):
                shown[arm] = runs[0]
                break
    return shown


def envelope(analysis: Analysis) -> Captioned | None:
    """The lowest validation loss that any run of an arm reached by so many training FLOPs."""
    lines, style = [], styles(analysis)
    for arm in analysis["arms"]:
        seen: dict[float, list[float]] = defaultdict(list)
        for run in analysis["runs"]:
            for spent, _, bpb in run["curve"] if run["arm"] == arm and run["role"] in FITTED else ():
                if is_number(bpb) and spent > 0:
                    seen[spent].append(bpb)
        points, lowest = [], float("inf")
        for spent in sorted(seen):
            if min(seen[spent]) < lowest:
                lowest = min(seen[spent])
                points.append((spent, lowest))
        if points:
            lines.append(Line(arm, style[arm], points))
    if not lines:
        return None
    chart = Chart(
        "envelope", "Loss against compute", "training FLOPs spent", "validation bits per byte", lines, log_x=True,
        x_text=exponent,
    )  # fmt: skip
    text = (
        "The lowest validation loss of any run by then. Within a run the learning rate is still high, so only ends "
        "of runs are what so many FLOPs can reach."
    )
    return Captioned(chart, text)
