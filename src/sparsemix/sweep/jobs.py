"""What a worker process does, whichever launcher started it: train a run, or measure some steps of it."""

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsemix.errors import TrainingError
from sparsemix.run import ERROR
from sparsemix.signals import Terminated

if TYPE_CHECKING:
    from sparsemix.settings import RunConfig


class WorkerLostError(RuntimeError):
    """A worker ended before its work did: it was killed, or its machine went."""


class Job(NamedTuple):
    """One run: settings, its folder, the folder of its data. Workers see the same files as who launches them."""

    config: "RunConfig"
    folder: Path
    data: Path


# How this process is told to stop; None outside a worker.
_stopped: Callable[[], bool] | None = None


def begin(threads: int, stopped: Callable[[], bool]) -> None:
    """In a worker: its threads, its way to be stopped, and memory that is kept instead of faulted in each step."""
    global _stopped
    _stopped = stopped
    # The terminal sends Ctrl-C to every process; only the launching one answers it, through `stopped`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # oneDNN keeps 1024 kernels, one for each number of tokens that an expert has taken: 0.5 GB more than this after 120
    # steps of a small MoE in bf16, and no faster. It is read at the first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    import torch

    from sparsemix.machine import allocator_is_tunable, tune_cpu_allocator

    if allocator_is_tunable():
        tune_cpu_allocator()
    torch.set_num_threads(threads)


def check_stop(_: dict[str, Any] | None = None) -> None:
    """Raise KeyboardInterrupt in a worker that was told to stop."""
    if _stopped is not None and _stopped():
        raise KeyboardInterrupt


def measured(told: Any, what: str) -> Any:
    """What a worker measured. Raises what it raised, and TrainingError that says what was lost where it died."""
    if isinstance(told, WorkerLostError):
        raise TrainingError(f"measuring {what}: {told}; use fewer workers or a smaller model, or try again")
    if isinstance(told, BaseException):
        raise told
    return told


def outcome(work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The result of `work(*args)`, or the exception that it raised, with its traceback as a note, fit to be sent."""
    try:
        return work(*args)
    except Terminated:
        # Whoever ended this worker alone means no other; a launching process that is ended too has its own signal.
        return WorkerLostError("killed by SIGTERM")
    except BaseException as error:
        error.add_note(traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            plain = RuntimeError(f"{type(error).__name__}: {error}")
            plain.add_note(traceback.format_exc())
            return plain
        return error


def train_job(job: Job) -> dict[str, Any]:
    """In a worker: one run, trained or resumed; its result."""
    from sparsemix.data import Shards
    from sparsemix.train import train

    check_stop()
    (job.folder / ERROR).unlink(missing_ok=True)
    result = train(job.config, job.folder, Shards.open(job.data), check_stop).result
    assert result is not None
    return result


def probe_job(config: "RunConfig", data: Path, steps: int) -> tuple[float, float]:
    """In a worker: (seconds per training step, seconds per token of evaluation), the medians of `steps` steps. Raises
    OutOfMemoryError."""
    from sparsemix.memory import of_run

    check_stop()
    with of_run(config):
        return _probe(config, data, steps)


def _probe(config: "RunConfig", data: Path, steps: int) -> tuple[float, float]:
    from statistics import median

    from sparsemix.checkpoint import TrainState
    from sparsemix.data import Shards
    from sparsemix.evaluate.perplexity import document_losses
    from sparsemix.machine import own_threads, pick_device, use_threads
    from sparsemix.train import train_step, training_batches

    shards, device = Shards.open(data), pick_device()
    model = config.model.build(config.seed).to(device).train()
    t = config.train
    optimizer = t.build_optimizer(model)
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
