"""Runs as arrays of Slurm jobs, through submitit."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import Field

from sparsemix.config import ConfigError
from sparsemix.sweep.jobs import WorkerLostError
from sparsemix.sweep.launch.base import LaunchConfig
from sparsemix.sweep.launch.stop_file import new_stop_file, work_until


class SlurmConfig(LaunchConfig):
    """What sbatch asks for; null leaves it to the cluster. workers: 16 jobs of an array at a time; threads: one;
    minutes: after which a run is requeued and resumes; executor: `local` runs the jobs here, to try without Slurm."""

    kind: Literal["slurm"] = "slurm"
    partition: str | None = None
    account: str | None = None
    minutes: int = Field(default=240, ge=1)
    gpus: int = Field(default=0, ge=0)
    memory_gib: float | None = Field(default=None, gt=0)
    executor: Literal["slurm", "local"] = "slurm"


class SlurmLauncher:
    """A job a run. They run on when the launching process is gone; the same command later reads what they did. All
    nodes have this package and see the study's folder."""

    def __init__(self, config: SlurmConfig, folder: Path) -> None:
        """Raises ConfigError."""
        try:
            import submitit
        except ImportError:
            raise ConfigError("launcher=slurm needs submitit; pip install 'sparsemix[slurm]'") from None
        self.workers, self.threads = config.workers or 16, config.threads or 1
        self._stop, self._pending = new_stop_file(folder), {}
        try:
            self._executor = submitit.AutoExecutor(folder.resolve(), cluster=config.executor)
        except RuntimeError:
            raise ConfigError(
                "launcher=slurm finds no sbatch here; log in to the cluster, or try it with executor=local"
            ) from None
        asked = {
            "timeout_min": config.minutes,
            "cpus_per_task": self.threads,
            "gpus_per_node": config.gpus or None,
            "mem_gb": config.memory_gib,
            "slurm_partition": config.partition,
            "slurm_account": config.account,
            "slurm_array_parallelism": self.workers,
        }
        self._executor.update_parameters(name="sparsemix", **{k: v for k, v in asked.items() if v is not None})

    def map(
        self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], watch: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """As `Launcher.map`."""
        tasks = self._executor.map_array(_Task(self._stop, self.threads, work), jobs) if jobs else []
        self._pending = dict(enumerate(tasks))
        while self._pending:
            for i in [i for i, task in self._pending.items() if task.done()]:
                task = self._pending.pop(i)
                error = task.exception()
                yield i, task.result() if error is None else WorkerLostError(_reason(error, task))
            watch()
            time.sleep(0.5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._pending:
            return
        self._stop.touch()
        for task in self._pending.values():
            if task.state in ("PENDING", "REQUEUED"):
                task.cancel(check=False)
        while not all(task.done() for task in self._pending.values()):
            time.sleep(0.5)
        self._stop.unlink()


class _Task:
    """What a job calls. submitit calls `checkpoint` before its time is up, or where another job takes its place."""

    def __init__(self, stop: Path, threads: int, work: Callable[..., Any]) -> None:
        self.stop, self.threads, self.work = stop, threads, work

    def __call__(self, args: tuple[Any, ...]) -> Any:
        return work_until(self.stop, self.threads, self.work, args)

    def checkpoint(self, args: tuple[Any, ...]) -> Any:
        """The same again: a run resumes from its own last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, args)


def _reason(error: Exception, task: Any) -> str:
    # Two lines say it; the job's own output follows them.
    return f"job {task.job_id} ended as {task.state}: {' '.join(str(error).strip().splitlines()[:2])}"
