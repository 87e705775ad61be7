"""Progress of many runs, read from their folders: bars on a terminal, plain lines elsewhere."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sparsemix.run import Run

PLAIN_EVERY_S = 20.0


class Watch:
    """Context manager; call it to look at the folders anew."""

    def __init__(self, folders: Sequence[Path], title: str, say: Callable[[str], None]) -> None:
        self.folders, self.title, self.say = list(dict.fromkeys(folders)), title, say
        self.finished = {folder for folder in self.folders if (folder / "result.json").is_file()}
        self.said_at = time.monotonic()
        self.tasks: dict[Path, TaskID] = {}
        self.budgets: dict[Path, float] = {}
        console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=2,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        self.overall = self.bars.add_task(self.title, total=len(self.folders), completed=len(self.finished), note="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def done(self, folder: Path) -> None:
        """Mark a run as ended and say what it reached."""
        self.finished.add(folder)
        result = Run(folder).result
        reached = f"{result['validation_bpb']:.4f} bits/byte on validation" if result else "failed"
        self.say(f"{self.title}: {len(self.finished)} of {len(self.folders)} runs, {folder.name} {reached}")
        if folder in self.tasks:
            self.bars.remove_task(self.tasks.pop(folder))
        self.bars.update(self.overall, completed=len(self.finished))

    def __call__(self) -> None:
        notes = []
        for folder in self.folders:
            if folder in self.finished or not (line := _last(folder)):
                continue
            if folder not in self.budgets:
                self.budgets[folder] = float(Run(folder).settings["train"]["budget_flops"])
            share = line["flops"] / self.budgets[folder]
            # After the last whole step, less than one step's FLOPs are left.
            ended = line["flops"] * (1 + 1 / line["step"]) > self.budgets[folder]
            note = (
                "evaluating"
                if ended
                else f"loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s, {line['flops']:.2g} FLOPs"
            )
            if folder not in self.tasks:
                self.tasks[folder] = self.bars.add_task(f"  {folder.name}", total=1.0, note=note)
            self.bars.update(self.tasks[folder], completed=share, note=note)
            notes.append(f"{folder.name} {share:.0%} ({note})")
        if self.bars.disable and notes and time.monotonic() - self.said_at > PLAIN_EVERY_S:
            self.said_at = time.monotonic()
            self.say("; ".join(notes))


class Stages:
    """Stages of one piece of work: a bar on a terminal, one plain line a stage elsewhere. Context manager; call it
    with (stage, done, total)."""

    def __init__(self, title: str, say: Callable[[str], None]) -> None:
        self.title, self.say = title, say

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.stage: str | None = None
        return self

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != self.stage:
            if self.bar.disable:
                self.say(f"{self.title}: {stage}")
            for task in self.bar.task_ids:
                self.bar.remove_task(task)
            self.bar.start()
            self.stage, self.task = stage, self.bar.add_task(f"{self.title}: {stage}", total=total)
        self.bar.update(self.task, completed=done, total=total)

    def finish(self) -> None:
        self.bar.stop()

    def __exit__(self, *_: object) -> None:
        self.finish()


def _last(folder: Path) -> dict[str, Any] | None:
    """The newest whole line of a run's log, read from the end of its file."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().split(b"\n")
    # What follows the last newline is still being written.
    return json.loads(lines[-2]) if len(lines) > 1 else None
