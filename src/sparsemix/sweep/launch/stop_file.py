"""How workers on other machines are told to stop: by a file that all of them see."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsemix.sweep.jobs import begin, outcome

# A shared file system is asked no more often than this.
LOOK_EVERY_S = 1.0


def new_stop_file(folder: Path) -> Path:
    """A path in `folder`, made if it is not there, at which nothing is yet."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve() / f"stop-{uuid.uuid4().hex[:8]}"


def work_until(stop: Path, threads: int, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """In a worker: the outcome of `work(*args)`, which is told to stop when there is a file at `stop`."""
    looked, found = float("-inf"), False

    def stopped() -> bool:
        nonlocal looked, found
        if not found and time.monotonic() - looked > LOOK_EVERY_S:
            looked, found = time.monotonic(), stop.exists()
        return found

    begin(threads, stopped)
    return outcome(work, args)
