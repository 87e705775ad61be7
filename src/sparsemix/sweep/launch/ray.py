"""Runs as tasks of a Ray cluster, local or remote."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import Field

from sparsemix.config import ConfigError
from sparsemix.sweep.jobs import WorkerLostError
from sparsemix.sweep.launch.base import LaunchConfig
from sparsemix.sweep.launch.stop_file import new_stop_file, work_until
from sparsemix.sweep.memory import needed_bytes


class RayConfig(LaunchConfig):
    """address: of a cluster (`auto`: the one that runs here), else one is started on this machine; workers: as many as
    the cluster has room for; threads: one; gpus: of each run; retries: of a run whose node was lost."""

    kind: Literal["ray"] = "ray"
    address: str | None = None
    gpus: float = Field(default=0.0, ge=0)
    retries: int = Field(default=2, ge=0)


class RayLauncher:
    """A task a run, each in a process of its own, placed by processors, GPUs and the memory that it is estimated to
    take. All nodes have this package and see the study's folder. When the launching process is gone, Ray ends its
    tasks; they resume from their last checkpoints."""

    def __init__(self, config: RayConfig, folder: Path) -> None:
        """Raises ConfigError."""
        try:
            import ray
        except ImportError:
            raise ConfigError("launcher=ray needs Ray; pip install 'sparsemix[ray]'") from None
        self.config, self._stop, self._ray = config, new_stop_file(folder), ray
        self.threads = config.threads or 1
        self._pending: dict[Any, int] = {}
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                told = " ".join(str(error).split())
                raise ConfigError(f"address={config.address} is no Ray cluster ({told}); start one there") from None
        self.workers = config.workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // self.threads)

    def map(
        self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], watch: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """As `Launcher.map`."""
        waiting = list(enumerate(jobs))
        while waiting or self._pending:
            # Without a limit of one's own the cluster knows best what it has room for.
            while waiting and (self.config.workers is None or len(self._pending) < self.workers):
                i, job = waiting.pop(0)
                task = self._task(needed_bytes(job))
                self._pending[task.remote(self._stop, self.threads, work, job)] = i
            for ready in self._ray.wait(list(self._pending), num_returns=1, timeout=0.5)[0]:
                try:
                    told = self._ray.get(ready)
                except self._ray.exceptions.RayError as error:
                    # What Ray itself says begins with the reason; a traceback ends with it.
                    ends = isinstance(error, self._ray.exceptions.RayTaskError)
                    told = WorkerLostError(str(error).strip().splitlines()[-1 if ends else 0])
                yield self._pending.pop(ready), told
            watch()

    def _task(self, memory: float) -> Any:
        # One call a process: what a run leaves behind in its own is no other run's.
        return self._ray.remote(max_calls=1, max_retries=self.config.retries)(work_until).options(
            num_cpus=self.threads, num_gpus=self.config.gpus, memory=memory
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending:
            self._stop.touch()
            # Tasks that wait for a place get none; the others save.
            self._ray.wait(list(self._pending), num_returns=len(self._pending))
            self._stop.unlink()
        if self._started:
            self._ray.shutdown()
