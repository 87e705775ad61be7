"""Runs on this machine: a process a run, as many at a time as fit into its processors and its memory."""

import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field

from sparsemix.machine import usable_processors
from sparsemix.memory import available_bytes
from sparsemix.sweep.jobs import WorkerLostError, begin, outcome
from sparsemix.sweep.launch.base import LaunchConfig
from sparsemix.sweep.memory import needed_bytes


class LocalConfig(LaunchConfig):
    """workers: one a core, one on a GPU; threads: what that leaves; memory_gib: what is free at the start."""

    kind: Literal["local"] = "local"
    memory_gib: float | None = Field(default=None, gt=0)


class _Worker(NamedTuple):
    position: int
    process: Any
    bytes: float


class LocalLauncher:
    """A process a run, so that one that is killed takes no other with it. On a CPU they are forked from a server that
    has imported torch: 10 ms each, where a new interpreter takes 2 s, and 3 s more for what torch imports late."""

    def __init__(self, config: LocalConfig, most: int | None = None) -> None:
        """`most`: how many runs at a time there can be work for."""
        self.workers, self.threads = _share_processors(config, most)
        self.memory = None if config.memory_gib is None else config.memory_gib * 2**30
        # A GPU cannot be used in a fork of a process that has touched it, which an import may do.
        server = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
        self._context: Any = multiprocessing.get_context("forkserver" if server else "spawn")
        if server:
            _start_server()
        self._running: dict[Any, _Worker] = {}

    def map(
        self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], watch: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """As `Launcher.map`. A job starts when it fits beside the running ones by its estimated bytes, the first that
        does; one that is too large for the machine runs alone."""
        waiting = {i: needed_bytes(job) for i, job in enumerate(jobs)}
        room = available_bytes() if self.memory is None else self.memory
        while waiting or self._running:
            while (i := self._next(waiting, room)) is not None:
                self._start(i, work, jobs[i], waiting.pop(i))
            for ready in multiprocessing.connection.wait(list(self._running), timeout=0.5):
                position = self._running[ready].position
                yield position, self._end(ready)
            watch()

    def _next(self, waiting: dict[int, float], room: float) -> int | None:
        if len(self._running) >= self.workers:
            return None
        left = room - sum(worker.bytes for worker in self._running.values()) if self._running else float("inf")
        return next((i for i, size in waiting.items() if size <= left), None)

    def _start(self, position: int, work: Callable[..., Any], args: tuple[Any, ...], size: float) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self.threads, work, args))
        process.start()
        # The worker's end is the worker's alone: when it is gone, so is the worker.
        theirs.close()
        self._running[ours] = _Worker(position, process, size)

    def _end(self, connection: Any) -> Any:
        """Wait for a worker; what it sent, or how it died."""
        worker = self._running[connection]
        try:
            told = connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            told = WorkerLostError(_death(worker.process.exitcode))
        worker.process.join()
        del self._running[connection]
        connection.close()
        return told

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._running:
            with suppress(OSError):
                connection.send("stop")
        for connection in list(self._running):
            self._end(connection)


def _start_server() -> None:
    """Start the process that workers are forked from, importing what they need while the caller goes on."""
    forkserver.set_forkserver_preload(["sparsemix.train", "torch._dynamo"])
    # Workers inherit it: the terminal's Ctrl-C must not end one between its birth and its first line.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, threads: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # Whatever comes from the launching process, a word or its end, means stop.
    begin(threads, connection.poll)
    told = outcome(work, args)
    with suppress(OSError):
        connection.send(told)


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} before its work was done"
    name = signal.Signals(-code).name
    return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def _share_processors(config: LocalConfig, most: int | None) -> tuple[int, int]:
    """(processes, threads each): one thread a process while the models are small, one process on a GPU."""
    cores = usable_processors()
    workers = config.workers or (1 if torch.cuda.is_available() else min(cores, most or cores))
    return workers, config.threads or max(1, cores // workers)
