"""A study: a folder with one text and many runs, each named by the hash of its settings, that reports read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsemix.config import Config, ConfigError, config_hash
from sparsemix.data import DataConfig, Shards, prepare
from sparsemix.report.records import Record, read_run
from sparsemix.run import locked, read_plan, refuse_foreign, write_plan
from sparsemix.settings import RunConfig
from sparsemix.sweep.jobs import Job
from sparsemix.sweep.launch import Launcher
from sparsemix.sweep.phase import working
from sparsemix.sweep.rounds import train_all
from sparsemix.sweep.watch import StudyWatch

Progress = Callable[[str, int, int | None], None]


class Cell(NamedTuple):
    """One run of a study: whose it is, its settings, and why it is there (`grid`, `seed`, `rate`)."""

    arm: str
    config: RunConfig
    role: str = "grid"

    @property
    def run(self) -> str:
        """The name of its folder below runs/."""
        return config_hash(self.config)


class Study:
    """plan.yaml (settings, and the cells so far), data/, runs/HASH/. Opening a folder of other settings is an error;
    the same settings go on where it stands, and cells of equal settings share a run whoever asks for them."""

    def __init__(self, out: Path, settings: Config, say: Callable[[str], None]) -> None:
        """`say` gets lines to print. Raises ConfigError."""
        self.out, self.settings, self.say = out, settings, say
        self.plan = open_plan(out, settings)
        self.failed: dict[str, str] = {}

    def prepare(self, data: DataConfig, progress: Progress | None = None) -> Shards:
        """The text, read once; `self.data` names it by its fingerprint from here on. Raises ConfigError."""
        with working(self.out) as phase:
            phase("preparing the text")
            self.shards = prepare(data, self.out / "data", progress)
        self.data = data.replace(fingerprint=self.shards.manifest["fingerprint"])
        return self.shards

    def folder(self, cell: Cell) -> Path:
        return self.out / "runs" / cell.run

    def train(self, cells: Sequence[Cell], launcher: Launcher, title: str, retries: int = 1) -> list[Record | None]:
        """The runs of the cells, in their order: done ones are read, the others trained or resumed; one that failed
        `retries` times more is None, is said, and stops nobody. Several processes may train one study at a time.
        Raises KeyboardInterrupt after every run has saved."""
        self._note(cells)
        jobs = {self.folder(cell): Job(cell.config, self.folder(cell), self.out / "data") for cell in cells}
        planned = {self.folder(cell): _planned(cell) for cell in cells}
        with working(self.out) as phase, StudyWatch(list(planned.items()), title, self.say) as watch:
            phase(title)
            failed = train_all(list(jobs.values()), launcher, watch, self.say, retries)
        for folder, error in failed.items():
            self.failed[folder.name] = str(error) or type(error).__name__
            self.say(f"{title}: {planned[folder]['arm']} ({folder.name}) failed: {self.failed[folder.name]}")
        return [None if self.folder(cell) in failed else self._read(cell, title) for cell in cells]

    def _read(self, cell: Cell, title: str) -> Record | None:
        record = read_run(self.folder(cell), cell.arm, cell.role)
        if record is None or record.diverged is None:
            return record
        if self.failed.get(cell.run) != record.diverged:
            self.say(f"{title}: {cell.arm} ({cell.run}) diverged: {record.diverged}")
        self.failed[cell.run] = record.diverged
        return None

    def _note(self, cells: Sequence[Cell]) -> None:
        """Write into plan.yaml whose each run is, before any of them begins."""
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out / ".plan.lock"):
            # Another process may have added its own.
            self.plan = open_plan(self.out, self.settings)
            known = {(entry["arm"], entry["run"], entry["role"]) for entry in self.plan["cells"]}
            new = {(cell.arm, cell.run, cell.role): _planned(cell) for cell in reversed(cells)}
            added = [entry for key, entry in reversed(new.items()) if key not in known]
            if added or not (self.out / "plan.yaml").is_file():
                self.plan["cells"] += added
                write_plan(self.out, self.plan)


def _planned(cell: Cell) -> dict[str, Any]:
    """What plan.yaml says of a cell: whose run it is, and what `sparsemix status` shows before it has begun."""
    config = cell.config
    about = {
        "budget": config.train.budget_flops,
        "width": config.model.d_model,
        "seed": config.seed,
        "lr": config.train.lr,
    }
    return {"arm": cell.arm, "run": cell.run, "role": cell.role, **about}


def open_plan(out: Path, settings: Config) -> dict[str, Any]:
    """What plan.yaml holds, or a new plan; raises ConfigError if the folder holds something else."""
    path = out / "plan.yaml"
    now = settings.model_dump(mode="json")
    if not path.is_file():
        refuse_foreign(out, "study")
        return {"settings": now, "cells": []}
    plan = read_plan(out)
    there = plan.get("settings", {})
    differ = [f"{k}={there.get(k)} there, {now[k]} asked" for k in now if there.get(k) != now[k]]
    if differ or "cells" not in plan:
        differ = differ or ["it holds a comparison of other kind"]
        raise ConfigError(f"out={out} holds another study ({'; '.join(differ)}); choose another folder")
    return plan
