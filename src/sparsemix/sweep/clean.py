"""What finished runs need no more, and what killed processes left half-written: found, and freed when asked."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparsemix.config import ConfigError
from sparsemix.durable import clear_all, delete, leftovers, size_of
from sparsemix.errors import RunBusyError
from sparsemix.run import Run


class Freed(NamedTuple):
    """A path that is removed, or would be, why, and the bytes of its files."""

    path: Path
    why: str
    bytes: int


def clean(folder: Path, dry_run: bool = False) -> Iterator[Freed]:
    """Everything below a folder that can go, each told as it goes: checkpoints of finished runs that were not asked to
    keep them (train.keep_checkpoints), and half-written files and folders of processes that are gone. A run that is
    trained just now is left alone. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name one that holds runs")
    for name, folders, _ in os.walk(folder):
        here = Path(name)
        folders.sort()
        for left in leftovers(here):
            yield Freed(left, "half-written by a process that is gone", size_of(left))
        if not dry_run:
            clear_all(here)
        if (freed := _checkpoints(here, dry_run)) is not None:
            yield freed


def _checkpoints(folder: Path, dry_run: bool) -> Freed | None:
    path = folder / "checkpoints"
    if not path.is_dir() or not (folder / "config.yaml").is_file():
        return None
    run = Run(folder)
    if run.result is None or run.settings.get("train", {}).get("keep_checkpoints", False):
        return None
    try:
        with run.lock():
            freed = Freed(path, "optimizer state of a finished run; its model stays", size_of(path))
            if not dry_run:
                delete(path)
            return freed
    except RunBusyError:
        return None
