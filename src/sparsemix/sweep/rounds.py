"""Many runs to their ends: broken ones resumed, lost ones tried again, those of other processes waited for."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from sparsemix.config import ConfigError
from sparsemix.durable import write_atomic
from sparsemix.errors import DamagedError, OutOfMemoryError, RunBusyError, TrainingError
from sparsemix.run import ERROR, Run
from sparsemix.signals import STOPS
from sparsemix.sweep.jobs import Job, train_job
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

    A lost worker, a lack of memory or an unexpected error costs one of `retries`; a loss that is not finite would not
    be finite again, nor a damaged file whole. Raises ConfigError, OSError (a full disk), KeyboardInterrupt and
    Terminated, which concern all runs."""
    failed: dict[Path, BaseException] = {}
    tries: Counter[Path] = Counter()

    def fail(job: Job, error: BaseException) -> None:
        failed[job.folder] = error
        _keep(job, error)
        watch.done(job.folder)

    def unfinished(several: Sequence[Job], seen: Callable[[Path], None]) -> list[Job]:
        """Those of the jobs that are still to do; `seen` is told which others were done meanwhile."""
        left = []
        for job in several:
            try:
                if _done(job):
                    seen(job.folder)
                else:
                    left.append(job)
            except DamagedError as error:
                fail(job, error)
        return left

    left = unfinished(jobs, lambda _: None)
    while left:
        again = [job for job in left if job.folder.exists() and Run(job.folder, job.config).busy]
        ready = [job for job in left if job not in again]
        for i, told in launcher.map(train_job, [(job,) for job in ready], watch):
            job = ready[i]
            if not isinstance(told, BaseException):
                watch.done(job.folder)
            elif isinstance(told, RunBusyError):
                again.append(job)
            elif _of_all(told):
                raise told
            elif tries[job.folder] < retries and not isinstance(told, (TrainingError, DamagedError)):
                tries[job.folder] += 1
                say(f"{job.folder.name}: {told}; it goes on from its last checkpoint")
                again.append(job)
            else:
                fail(job, told)
        left = unfinished(again, watch.done)
        if left and not ready:
            watch()
            time.sleep(0.5)
    return failed


def _done(job: Job) -> bool:
    """Is the run finished, and as it was then? Raises DamagedError."""
    if not job.folder.exists() or (run := Run(job.folder, job.config)).result is None:
        return False
    run.check()
    return True


def _of_all(error: BaseException) -> bool:
    """Does what ended one run concern every other as well?"""
    alone = isinstance(error, (DamagedError, OutOfMemoryError))
    return not alone and isinstance(error, (*STOPS, OSError, ConfigError))


def _keep(job: Job, error: BaseException) -> None:
    """Leave the error and where it came from in the run's folder, which is made where the run did not come so far."""
    if not (job.folder / "config.yaml").is_file():
        Run(job.folder, job.config)
    notes = getattr(error, "__notes__", [])
    write_atomic(job.folder / ERROR, "\n\n".join([str(error) or type(error).__name__, *notes]) + "\n")
