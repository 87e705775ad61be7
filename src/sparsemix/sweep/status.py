"""Where the runs of a folder stand, read from the folder alone, without torch."""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rich.table import Table
from rich.text import Text

from sparsemix.config import ConfigError
from sparsemix.inputs import trusted
from sparsemix.report.arm import arm_of
from sparsemix.run import ERROR, LOCK, Run, read_plan
from sparsemix.sweep.phase import phase_of

State = Literal["running", "failed", "damaged", "stopped", "waiting", "done"]
# Locks do not reach across every file system: a run that wrote this lately is taken to run.
STALE_S = 60.0
# What of a logged line is shown.
SHOWN = ("step", "loss", "flops", "tokens_per_s", "wall_s")
_BLOCK = 1 << 16
STYLES: dict[State, str] = {
    "running": "cyan",
    "failed": "red",
    "damaged": "red",
    "stopped": "yellow",
    "waiting": "dim",
    "done": "green",
}


@dataclass(frozen=True)
class RunStatus:
    """One run. share: of its FLOPs, spent; loss: of the newest step, nats per token; left_s: seconds of training at its
    rate so far; flops_per_s: that rate; said: bits per byte once it is done, or why it failed."""

    folder: Path
    arm: str
    budget: float
    width: int
    seed: int
    lr: float | None = None
    state: State = "waiting"
    share: float = 0.0
    loss: float | None = None
    tokens_per_s: float | None = None
    flops_per_s: float | None = None
    said: str = ""

    @property
    def left_s(self) -> float | None:
        return (1 - self.share) * self.budget / self.flops_per_s if self.flops_per_s else None


def cells_of(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, cell) of every run: a study's, by its plan; a comparison's or another folder's; or the run itself.
    Raises ConfigError where there is none."""
    if (cells := read_plan(out).get("cells")) is not None:
        return list({out / "runs" / cell["run"]: cell for cell in reversed(cells)}.items())[::-1]
    folders = [out] if has_settings(out) else sorted(p.parent for p in out.glob("*/config.yaml"))
    if not folders and not (out / "plan.yaml").exists() and phase_of(out) is None:
        raise ConfigError(f"{out} holds no runs; name the folder of a study, a comparison or a run")
    return [(folder, {}) for folder in folders]


def has_settings(folder: Path) -> bool:
    """Did a run begin in this folder?"""
    return (folder / "config.yaml").exists()


def look(folder: Path, cell: dict[str, Any]) -> RunStatus:
    """Where a run stands; `cell` is what its study's plan says of it. One whose files are damaged is that,
    whatever else it did, and says why."""
    planned = {"arm": "", "budget": 0.0, "width": 0, "seed": 0} | _planned(cell)
    if not has_settings(folder):
        return RunStatus(folder, **planned)
    try:
        with trusted(folder):
            return _look(folder, cell)
    except ConfigError as error:
        return RunStatus(folder, **planned, state="damaged", said=str(error))


def _look(folder: Path, cell: dict[str, Any]) -> RunStatus:
    run, line, known = Run(folder), last_line(folder), _about(folder) | _planned(cell)
    if line is not None:
        known |= {name: float(line[name]) for name in ("loss", "tokens_per_s")}
        known |= {"share": _share(line, known["budget"])}
        known |= {"flops_per_s": line["flops"] / line["wall_s"] if line["wall_s"] else None}
    if (result := run.result) is not None:
        return RunStatus(folder, **known | {"state": "done", "share": 1.0, "said": f"{result['bpb']:.4f} bits/byte"})
    if run.busy:
        said = "evaluating" if known.get("share") == 1.0 else ""
        return RunStatus(folder, **known, state="running", said=said)
    if (folder / ERROR).is_file():
        why = (folder / ERROR).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        return RunStatus(folder, **known, state="failed", said=why)
    if line is None:
        return RunStatus(folder, **known)
    # A lock that was taken on this machine and is free now has no holder; another machine's may not be seen from here.
    here = socket.gethostname() in (folder / LOCK).read_text(encoding="utf-8") if (folder / LOCK).is_file() else False
    fresh = time.time() - (folder / "metrics.jsonl").stat().st_mtime < STALE_S
    return RunStatus(folder, **known, state="running" if fresh and not here else "stopped")


def _planned(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in ("arm", "budget", "width", "seed", "lr") if name in cell}


@lru_cache(maxsize=4096)
def _about(folder: Path) -> dict[str, Any]:
    settings = Run(folder).settings
    return {
        "arm": arm_of(settings),
        "budget": float(settings["train"]["budget_flops"]),
        "width": int(settings["model"]["d_model"]),
        "seed": int(settings["seed"]),
        "lr": float(settings["train"]["lr"]),
    }


def _share(line: dict[str, Any], budget: float) -> float:
    """Of the budget, spent; 1 after the last whole step, when less than one step's FLOPs are left."""
    ended = line["flops"] * (1 + 1 / line["step"]) > budget
    return 1.0 if ended else line["flops"] / budget


def last_line(folder: Path) -> dict[str, Any] | None:
    """The newest whole line of a run's log, however long, read from the end of its file; None while there is none, or
    where what stands there is no such line (a disk tore it)."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            line = json.loads(_last(file))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and all(isinstance(line.get(name), (int, float)) for name in SHOWN)
    return line if whole and line["step"] > 0 else None


def _last(file: BinaryIO) -> bytes:
    """What stands between the last two newlines; what follows the last is still being written."""
    at, tail = file.seek(0, os.SEEK_END), b""
    while at > 0 and tail.count(b"\n") < 2:
        # Twice as much each time, so that a line of any length is read in linear time.
        size = min(at, max(_BLOCK, len(tail)))
        at = file.seek(at - size)
        tail = file.read(size) + tail
    return tail.rpartition(b"\n")[0].rpartition(b"\n")[2]


class Board:
    """The runs of a folder, looked at again and again; finished ones are read once."""

    def __init__(self, cells: Sequence[tuple[Path, dict[str, Any]]]) -> None:
        self.cells = list(cells)
        self._done: dict[Path, RunStatus] = {}

    def look(self) -> list[RunStatus]:
        """Every run, in the plan's order."""
        found = [self._done.get(folder) or look(folder, cell) for folder, cell in self.cells]
        self._done |= {run.folder: run for run in found if run.state == "done"}
        return found


def totals(runs: Sequence[RunStatus], phase: str | None = None) -> str:
    """How many runs are in which state, and when all will be done at the present rate; `phase` is what their
    comparison or study does just now (`phase_of`)."""
    counts = {state: sum(run.state == state for run in runs) for state in ("done", *STYLES)}
    said = [f"{counts['done']} of {len(runs)} runs done"]
    said += [f"{count} {state}" for state, count in counts.items() if count and state != "done"]
    rate = sum(run.flops_per_s or 0.0 for run in runs if run.state == "running")
    if rate:
        left = sum((1 - run.share) * run.budget for run in runs if run.state in ("running", "waiting", "stopped"))
        said.append(f"about {duration(left / rate)} of training left")
    if phase is not None:
        said.append(f"at work: {phase}")
    return ", ".join(said)


def table(runs: Sequence[RunStatus], rows: int | None = None) -> Table:
    """A row a run; with fewer `rows` than runs, what runs or failed comes first and the rest is left out."""
    shown = list(runs)
    if rows is not None and len(runs) > rows:
        shown = sorted(runs, key=lambda run: list(STYLES).index(run.state))[:rows]
    made = Table(box=None, pad_edge=False)
    for name, justify in (
        ("arm", "left"),
        ("budget", "right"),
        ("width", "right"),
        ("seed", "right"),
        ("rate", "right"),
        ("state", "left"),
    ):
        made.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("share", "loss", "tokens/s", "left"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("run", no_wrap=True)
    made.add_column("", overflow="fold")
    for run in shown:
        made.add_row(
            run.arm,
            f"{run.budget:.3g}",
            str(run.width),
            str(run.seed),
            "" if run.lr is None else f"{run.lr:.3g}",
            Text(run.state, style=STYLES[run.state]),
            f"{run.share:.0%}" if run.share else "",
            f"{run.loss:.3f}" if run.loss is not None else "",
            f"{run.tokens_per_s:,.0f}" if run.tokens_per_s else "",
            duration(run.left_s) if run.state == "running" and run.left_s else "",
            run.folder.name,
            run.said,
        )
    if len(shown) < len(runs):
        made.caption = f"and {len(runs) - len(shown)} more"
    return made


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3.5 h, 2.1 days."""
    for unit, length, until in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 200_000)):
        if seconds < until:
            return f"{seconds / length:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86_400:.1f} days"
