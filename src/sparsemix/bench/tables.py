"""The results as tables of the terminal."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparsemix.report.numbers import DASH, si


def amount(value: float | None) -> str:
    """A ratio with as many digits as it can have."""
    return DASH if value is None else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def verdict(row: dict[str, Any]) -> str:
    """'met, goal too', 'missed', or nothing without a floor."""
    if row.get("met") is None:
        return ""
    if not row["met"]:
        return "missed"
    goal = row["goal"]
    reached = goal is not None and (row["value"] <= goal if row["at_most"] else row["value"] >= goal)
    return "met, goal too" if reached else "met"


def floor_of(row: dict[str, Any]) -> str:
    """'>= 8 (15)': the floor and the goal."""
    if "floor" not in row:
        return ""
    goal = "" if row["goal"] is None else f" ({row['goal']:g})"
    return f"{'≤' if row['at_most'] else '≥'} {row['floor']:g}{goal}"


def console_tables(result: dict[str, Any]) -> Group:
    """Times of all contenders, then the numbers with their floors."""
    times = Table("case, contender", box=None, pad_edge=False)
    for column in ("min", "median", "CPU", "page faults", "share of ceilings"):
        times.add_column(column, justify="right")
    ratios = Table("number", "what", box=None, pad_edge=False)
    for column in ("value", "floor (goal)"):
        ratios.add_column(column, justify="right")
    ratios.add_column("")
    for name, record in result["works"].items():
        said = "" if record["said"] == "ok" else record["said"]
        times.add_row(Text(f"{name}: {record['about']}", style="bold"), *([""] * 4), said)
        for case in record["cases"]:
            for contender, row in case["contenders"].items():
                times.add_row(*time_row(f"  {case['name']}, {contender}", contender, case, row))
            for row in case["numbers"]:
                value = si(row["value"], row["what"]) if name == "ceilings" else amount(row["value"])
                what = row["refused"] or ("" if name == "ceilings" else row["what"])
                ratios.add_row(row["id"], what, value, floor_of(row), verdict(row))
    return Group(times, Text(""), ratios)


def time_row(title: str, contender: str, case: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """One contender's times, or why it has none."""
    if "peak_bytes" in row:
        return [title, f"peak {si(row['peak_bytes'], 'B')}", "", "", "", ""]
    if "min_s" not in row:
        return [title, "", "", "", "", row["said"]]
    share = case.get("share_of_ceilings") if contender == "ours" else None
    note = f"{share:.0%}" if share else "" if row["said"] in ("ok", "not the same function") else row["said"]
    seconds = [time(row[key]) for key in ("min_s", "median_s", "cpu_s")]
    return [title, *seconds, si(round(row["faults"])), note]


def time(seconds: float) -> str:
    """Milliseconds below a second; no shorter unit, so that a column is read at a glance."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
