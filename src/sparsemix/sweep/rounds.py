"""Many runs to their ends: broken ones resumed, lost ones tried again, those of other processes waited for."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from sparsemix.config import ConfigError
from sparsemix.durable import write_atomic
from sparsemix.errors import RunBusyError, TrainingError
from sparsemix.run import Run
from sparsemix.sweep.jobs import ERROR, Job, train_job
from sparsemix.sweep.launch import Launcher


class Watcher(Protocol):
    """Told when to look at the run folders, and which run has ended."""

    def __call__(self) -> None: ...

    def done(self, folder: Path) -> None: ...


def train_all(
    jobs: Sequence[Job], launcher: Launcher, watch: Watcher, say: Callable[[str], None], retries: int = 1
) -> dict[Path, BaseException]:
    """Train what is left of the runs; folder -> error of those that failed. A run that another process trains is left
    to it, and read when it has ended.

    A lost worker or an unexpected error costs one of `retries`; a loss that is not finite would not be finite again.
    Raises ConfigError, OSError (a full disk) and KeyboardInterrupt, which concern all runs."""
    failed: dict[Path, BaseException] = {}
    tries: Counter[Path] = Counter()
    left = [job for job in jobs if not _done(job)]
    while left:
        ready = [job for job in left if not (job.folder.exists() and Run(job.folder, job.config).busy)]
        again = [job for job in left if job not in ready]
        for i, told in launcher.map(train_job, [(job,) for job in ready], watch):
            job = ready[i]
            if isinstance(told, RunBusyError):
                again.append(job)
                continue
            if isinstance(told, (KeyboardInterrupt, OSError, ConfigError)):
                raise told
            if isinstance(told, BaseException):
                tries[job.folder] += 1
                if tries[job.folder] <= retries and not isinstance(told, TrainingError):
                    say(f"{job.folder.name}: {told}; it goes on from its last checkpoint")
                    again.append(job)
                    continue
                failed[job.folder] = told
                _keep(job.folder, told)
            watch.done(job.folder)
        left = []
        for job in again:
            if _done(job):
                watch.done(job.folder)
            else:
                left.append(job)
        if left and not ready:
            watch()
            time.sleep(0.5)
    return failed


def _done(job: Job) -> bool:
    return job.folder.exists() and Run(job.folder, job.config).result is not None


def _keep(folder: Path, error: BaseException) -> None:
    """Leave the error and where it came from in the run's folder, if the run came so far as to have one."""
    if folder.exists():
        notes = getattr(error, "__notes__", [])
        write_atomic(folder / ERROR, "\n\n".join([str(error) or type(error).__name__, *notes]) + "\n")
