"""Runs on this machine's cores: a pool of processes, watched through their run folders, stopped gently."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sparsemix.settings import RunConfig


class Job(NamedTuple):
    """One run: settings, its folder, the folder of its data."""

    config: "RunConfig"
    folder: Path
    data: Path


class Pool:
    """Worker processes with `threads` threads each, of which train.threads=auto takes as many as help. `map` hands out
    work; leaving the pool with an exception lets every worker save a checkpoint first."""

    def __init__(self, workers: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop = context.Event()
        self._executor = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start, initargs=(threads, self.stop, os.getpid())
        )

    def map(
        self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], watch: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """(position, result or exception) of `work(*job)` as each ends; `watch` is called about twice a second."""
        futures: dict[Future[Any], int] = {self._executor.submit(work, *job): i for i, job in enumerate(jobs)}
        while futures:
            for future in wait(futures, timeout=0.5, return_when=FIRST_COMPLETED).done:
                error = future.exception()
                yield futures.pop(future), error if error is not None else future.result()
            watch()

    def close(self, gently: bool) -> None:
        """Wait for the workers; if `gently` is asked for, tell them to save and stop first."""
        if gently:
            self.stop.set()
        self._executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def pool(workers: int, threads: int) -> Iterator[Pool]:
    made = Pool(workers, threads)
    try:
        yield made
    except BaseException:
        made.close(gently=True)
        raise
    made.close(gently=False)


_stop: Any = None
_parent = 0


def _start(threads: int, stop: Any, parent: int) -> None:
    """In a worker: its threads, its way to be stopped, and memory that is kept instead of faulted in each step."""
    global _stop, _parent
    _stop, _parent = stop, parent
    # The terminal sends Ctrl-C to every process; only the parent answers it, through `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from sparsemix.machine import allocator_is_tunable, tune_cpu_allocator

    if allocator_is_tunable():
        tune_cpu_allocator()
    torch.set_num_threads(threads)


def check_stop(_: dict[str, Any] | None = None) -> None:
    """Raise KeyboardInterrupt in a worker that was told to stop or whose parent is gone."""
    if _stop is not None and (_stop.is_set() or os.getppid() != _parent):
        raise KeyboardInterrupt


def train_job(job: Job) -> dict[str, Any]:
    """In a worker: one run, trained or resumed; its result."""
    from sparsemix.data import Shards
    from sparsemix.train import train

    try:
        check_stop()
        result = train(job.config, job.folder, Shards.open(job.data), check_stop).result
    except KeyboardInterrupt:
        if os.getppid() != _parent:
            # Nobody is left to hand out work or take results; a worker would wait for it forever.
            os._exit(1)
        raise
    assert result is not None
    return result


def probe_job(config: "RunConfig", data: Path, steps: int) -> tuple[float, float]:
    """In a worker: (seconds per training step, seconds per token of evaluation), the medians of `steps` steps."""
    from statistics import median

    from sparsemix.checkpoint import TrainState
    from sparsemix.data import Shards
    from sparsemix.evaluate.perplexity import document_losses
    from sparsemix.machine import own_threads, pick_device, use_threads
    from sparsemix.optim import build_optimizer
    from sparsemix.train import train_step, training_batches

    check_stop()
    shards, device = Shards.open(data), pick_device()
    model = config.model.build(config.seed).to(device).train()
    t = config.train
    optimizer = build_optimizer(model, t.lr, t.weight_decay, matrices=t.optimizer, table_moment=t.table_moment)
    batches = training_batches(config, shards, TrainState(), device)
    seconds = []
    with own_threads():
        use_threads(t.threads)
        for _ in range(steps):
            began = time.perf_counter()
            train_step(config, model, optimizer, [next(batches) for _ in range(t.accumulation)])
            optimizer.step()
            seconds.append(time.perf_counter() - began)
            check_stop()
        batch = next(batches)
        began = time.perf_counter()
        document_losses(model, [batch])
        return median(seconds), (time.perf_counter() - began) / batch.tokens.numel()
