"""Progress of runs, read from their folders: bars or a table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sparsemix.report.numbers import si
from sparsemix.run import Run
from sparsemix.sweep.status import Board, has_settings, last_line, table, totals
from sparsemix.terminal import notes, only_shows

PLAIN_EVERY_S = 20.0
# Work that counts small things calls often, and drawing takes longer than counting.
REDRAWN_EVERY_S = 0.1


class Watch:
    """Context manager; call it to look at the folders anew."""

    def __init__(self, folders: Sequence[Path], title: str, say: Callable[[str], None]) -> None:
        self.folders, self.title, self.say = list(dict.fromkeys(folders)), title, say
        self.finished = {folder for folder in self.folders if (folder / "result.json").is_file()}
        self.said_at = time.monotonic()
        self.tasks: dict[Path, TaskID] = {}
        self.budgets: dict[Path, float] = {}
        screen = notes()
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=screen,
            refresh_per_second=2,
            disable=not screen.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        self.overall = self.bars.add_task(self.title, total=len(self.folders), completed=len(self.finished), note="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    @only_shows
    def done(self, folder: Path) -> None:
        """Mark a run as ended and say what it reached."""
        self.finished.add(folder)
        # A worker may have died before it made the run's folder.
        result = Run(folder).result if has_settings(folder) else None
        reached = f"{result['validation_bpb']:.4f} bits/byte on validation" if result else "failed"
        self.say(f"{self.title}: {len(self.finished)} of {len(self.folders)} runs, {folder.name} {reached}")
        if folder in self.tasks:
            self.bars.remove_task(self.tasks.pop(folder))
        self.bars.update(self.overall, completed=len(self.finished))

    @only_shows
    def __call__(self) -> None:
        going = []
        for folder in self.folders:
            if folder in self.finished or not (line := last_line(folder)):
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
            going.append(f"{folder.name} {share:.0%} ({note})")
        if self.bars.disable and going and time.monotonic() - self.said_at > PLAIN_EVERY_S:
            self.said_at = time.monotonic()
            self.say("; ".join(going))


class StudyWatch:
    """A table of a study's runs. Context manager; call it to look at the folders anew."""

    def __init__(self, cells: Sequence[tuple[Path, dict[str, Any]]], title: str, say: Callable[[str], None]) -> None:
        self.board, self.title, self.say = Board(cells), title, say
        self.console = notes()
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)
        self.said_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        self()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @only_shows
    def done(self, folder: Path) -> None:
        """Say what a run that has ended reached."""
        runs = self.board.look()
        ended = next(run for run in runs if run.folder == folder)
        count = sum(run.state == "done" for run in runs)
        what = f"{ended.arm} {ended.budget:.3g} FLOPs, width {ended.width}, seed {ended.seed} ({folder.name})"
        self.say(f"{self.title}: {count} of {len(runs)} runs, {what}: {ended.state} {ended.said}")

    @only_shows
    def __call__(self) -> None:
        if self.live.is_started:
            runs = self.board.look()
            # Title, header, and the line that says how many are left out.
            rows = max(3, self.console.height - 4)
            self.live.update(Group(f"{self.title}: {totals(runs)}", table(runs, rows)))
        elif time.monotonic() - self.said_at > PLAIN_EVERY_S:
            self.said_at = time.monotonic()
            runs = self.board.look()
            going = [f"{run.arm} {run.folder.name} {run.share:.0%}" for run in runs if run.state == "running"]
            self.say(f"{self.title}: {'; '.join([totals(runs), *going])}")


class Stages:
    """Stages of one piece of work: a bar on a terminal; elsewhere a plain line a stage, and how far it is every 20 s.
    Context manager; call it with (stage, done, total), where done counts bytes if there is no total."""

    def __init__(self, title: str, say: Callable[[str], None]) -> None:
        self.title, self.say = title, say

    def __enter__(self) -> Self:
        screen = notes()
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[far]}", markup=False),
            console=screen,
            transient=True,
            disable=not screen.is_terminal,
        )
        self.stage: str | None = None
        self.drawn_at = self.said_at = time.monotonic()
        return self

    @only_shows
    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage == self.stage and now - self.drawn_at < REDRAWN_EVERY_S:
            return
        self.drawn_at = now
        far = f"{done / total:.0%}" if total else si(done, "B") if done else ""
        if stage != self.stage:
            self.said_at = now
            if self.bar.disable:
                self.say(f"{self.title}: {stage}")
            for task in self.bar.task_ids:
                self.bar.remove_task(task)
            self.bar.start()
            self.stage, self.task = stage, self.bar.add_task(f"{self.title}: {stage}", total=total, far="")
        elif self.bar.disable and far and now - self.said_at > PLAIN_EVERY_S:
            self.said_at = now
            self.say(f"{self.title}: {stage}, {far}")
        self.bar.update(self.task, completed=done, total=total, far=far)

    def finish(self) -> None:
        self.bar.stop()

    def __exit__(self, *_: object) -> None:
        self.finish()
