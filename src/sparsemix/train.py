"""Training: one function, one loop."""

import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsemix import checkpoint, machine, memory, saved
from sparsemix.config import ConfigError
from sparsemix.data import Batch, Parts, Shards
from sparsemix.durable import aside, delete
from sparsemix.errors import DIVERGED, TrainingError
from sparsemix.evaluate.memory import PeakMemory
from sparsemix.evaluate.perplexity import document_losses, flops_spent, reestimate, to_device
from sparsemix.evaluate.routing import routing_report
from sparsemix.layers import update
from sparsemix.machine import pick_compile, pick_device, pick_dtype
from sparsemix.model import LM, BlockRunner, after
from sparsemix.ops.impl import own_picks, picked
from sparsemix.optim import Optimizer, clip_groups, schedule, second_stage
from sparsemix.provenance import hardware, joined, versions
from sparsemix.run import CONVENTION, Run, refusal_leaves_nothing
from sparsemix.settings import RunConfig
from sparsemix.signals import STOPS, stops_wait
from sparsemix.step import accumulate, activation_bytes, block_runner, read

Progress = Callable[[dict[str, Any]], None]


@machine.own_threads()
@own_picks()
def train(config: RunConfig, folder: Path, shards: Shards, progress: Progress | None = None) -> Run:
    """Train to the budget and evaluate, or resume where the folder's last checkpoint stands; a finished run returns
    at once. A keyboard interrupt or SIGTERM saves a checkpoint first. Raises ConfigError (which leaves nothing that was
    not there), OutOfMemoryError, TrainingError, and RunBusyError where another process trains the run. Whatever
    `progress` raises ends the training: it is how a caller stops one."""
    with refusal_leaves_nothing(folder), memory.of_run(config):
        return _trained(config, folder, shards, progress)


def _trained(config: RunConfig, folder: Path, shards: Shards, progress: Progress | None) -> Run:
    _ = config.steps
    shards.num_windows(config.model.seq_len)
    if shards.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {shards.vocab_size}"
        )
    # Before anything is written: a source that is gone or does not fit leaves nothing.
    new = None if (folder / "config.yaml").is_file() else first_model(config, folder)
    run = Run(folder, config)
    if run.result is None:
        with run.lock():
            # Another process may have finished it meanwhile.
            if run.result is None:
                _train(config, run, shards, progress, new)
    return run


def _train(config: RunConfig, run: Run, shards: Shards, progress: Progress | None, new: LM | None) -> None:
    """Train and evaluate in the folder of `run`; `new` is the model before its first step, if it was made already."""
    steps, folder, device = config.steps, run.folder, pick_device()
    model = (new or first_model(config, folder)).to(device).train()
    t = config.train
    optimizer = t.build_optimizer(model)
    state = checkpoint.load(folder / "checkpoints", model, optimizer)
    run.rewind(state.step)
    state.versions = joined(state.versions, versions())
    # What was picked at the start stays, wherever the run goes on.
    state.threads = machine.use_threads(t.threads, state.threads)
    state.dtype = state.dtype or str(pick_dtype(t.dtype, device)).removeprefix("torch.")
    state.compiled = pick_compile(t.compile, t.budget_flops, device) if state.compiled is None else state.compiled
    dtype, blocks = getattr(torch, state.dtype), block_runner(model, state.compiled, config.train.recompute_blocks)
    total = steps * config.step_flops
    marks = np.linspace(0, total, config.train.evals + 1)[1:-1] * (1 - 1e-9)
    log_every = max(1, steps // 1000)
    batches = training_batches(config, shards, state, device)
    peak, saved_at, began = PeakMemory(), time.monotonic(), time.monotonic() - state.wall_s
    try:
        with stops_wait() as interrupted:
            # Where routing decides what a step costs, the budget is charged with what was really spent.
            while state.flops + config.step_flops <= total * (1 + 1e-9) and not interrupted:
                at = state.flops / config.step_flops
                rate = schedule(at, steps, round(config.train.warmup * steps), shape=config.train.schedule)
                optimizer.set_lr(config.train.lr * rate)
                if config.train.schedule == "two_stage" and second_stage(at, steps):
                    for group in optimizer.param_groups:
                        group["weight_decay"] = 0.0
                # Random routing draws from the seed and the step alone, so a resumed run draws the same.
                torch.manual_seed(zlib.crc32(f"{config.seed}/{state.step}".encode()))
                micro = [next(batches) for _ in range(config.train.accumulation)]
                line = train_step(config, model, optimizer, micro, dtype, blocks)
                if not np.isfinite(sum(line.values())):
                    raise _failure(config, model, optimizer, state, folder, line)
                optimizer.step()
                state.step += 1
                state.cursor += config.batch_size
                spent = config.step_flops + extra_flops(config, line)
                last = state.flops + spent + config.step_flops > total * (1 + 1e-9)
                evaluates = config.train.evals > 0 and (
                    last or bool(((state.flops < marks) & (marks <= state.flops + spent)).any())
                )
                state.flops += spent
                state.wall_s = time.monotonic() - began
                state.kernels |= picked()
                state.peak_memory_bytes = max(state.peak_memory_bytes, peak.bytes())
                tokens = state.cursor * config.model.seq_len
                line |= {"step": state.step, "flops": state.flops, "tokens": tokens, "wall_s": state.wall_s}
                line |= {"lr": config.train.lr * rate, "tokens_per_s": tokens / state.wall_s}
                if evaluates:
                    line["validation_bpb"] = validation_bpb(config, model, shards)
                    began += time.monotonic() - began - state.wall_s  # evaluation is not training time
                if state.step % log_every == 0 or evaluates or last:
                    run.log(**line)
                if progress is not None:
                    progress({**line, "steps": steps, "budget_flops": config.train.budget_flops})
                if time.monotonic() - saved_at > config.train.checkpoint_s:
                    checkpoint.save(folder / "checkpoints", state, model, optimizer)
                    saved_at = time.monotonic()
    except STOPS:
        checkpoint.save(folder / "checkpoints", state, model, optimizer)
        raise
    checkpoint.save(folder / "checkpoints", state, model, optimizer)
    torch.manual_seed(zlib.crc32(f"{config.seed}/after".encode()))
    reestimate(model, reestimation_batches(config, shards))
    saved.write(model, folder / "model", shards.tokenizer())
    spent = {
        "seed": config.seed,
        "lr": config.train.lr,
        "steps": state.step,
        "flops": state.flops,
        "tokens": state.cursor * config.model.seq_len,
        "wall_s": state.wall_s,
        "tokens_per_s": state.cursor * config.model.seq_len / state.wall_s,
        "peak_memory_bytes": max(state.peak_memory_bytes, peak.bytes()),
        "dtype": state.dtype,
        "compiled": state.compiled,
        "threads": state.threads,
    }
    about = {"cost": config.costs(), "convention": CONVENTION}
    about |= {
        "versions": state.versions,
        "hardware": hardware(),
        "kernels": dict(sorted((state.kernels | picked()).items())),
    }
    found = evaluate(config, model, shards, folder)
    # Eager blocks: compiled ones would be compiled anew for its smaller batch. Last, as it may draw random numbers.
    plain = block_runner(model, False, config.train.recompute_blocks)
    batch = next(training_batches(config, shards, state, device))
    found["activation_bytes_per_token"] = activation_bytes(model, batch, dtype, plain)
    run.finish({**spent, **found, **about})
    if not t.keep_checkpoints:
        delete(folder / "checkpoints")


def first_model(config: RunConfig, folder: Path) -> LM:
    """The model before its first step: drawn from the seed, or with its source's weights. Raises ConfigError."""
    model = config.model.build(config.seed)
    # A run that goes on has weights of its own, and needs its source no longer.
    if config.init is not None and not checkpoint.steps(folder / "checkpoints"):
        config.init.check()
        saved.load_weights(model, Path(config.init.folder))
    return model


def training_batches(
    config: RunConfig, shards: Shards, state: checkpoint.TrainState, device: torch.device
) -> Iterator[Batch]:
    """Micro-batches from the state's cursor on; the order depends on the seed alone."""
    cursor, size = state.cursor, config.batch_size // config.train.accumulation
    while True:
        yield to_device(shards.batch(cursor, size, config.model.seq_len, config.seed), device)
        cursor += size


def train_step(
    config: RunConfig,
    model: LM,
    optimizer: Optimizer,
    batches: list[Batch],
    dtype: torch.dtype | None = None,
    run: BlockRunner = after,
) -> dict[str, float]:
    """Gradients of one step, clipped, and running statistics moved; the caller steps the optimizer. The line that comes
    back is the only thing read from the device."""
    optimizer.zero_grad()
    dtype = dtype or pick_dtype(config.train.dtype, model.embed.weight.device)
    seen = accumulate(model, batches, dtype, run)
    norms = [optimizer.clip_grad_norm_(group, config.train.clip_norm) for group in clip_groups(model)]
    line = read({**seen.scalars, "grad_norm": norms[0]})
    # A step that cannot be taken must leave the last good state as it was.
    if np.isfinite(sum(line.values())):
        update(model, seen.stats)
    return line


def extra_flops(config: RunConfig, line: dict[str, float]) -> float:
    """Training FLOPs of a step beyond `step_flops`, as its layers report them, averaged over micro-batches."""
    extra = sum(value for name, value in line.items() if name.endswith(".extra_flops"))
    return 3.0 * config.train.accumulation * extra


def validation_bpb(config: RunConfig, model: LM, shards: Shards) -> float:
    """Causal bits per byte on parts of the validation documents."""
    losses = document_losses(model, _eval_batches(config, shards, "validation"))
    return losses.bits_per_byte(int(_parts(config, shards, "validation").bytes.sum()))


def _parts(config: RunConfig, shards: Shards, split: str) -> Parts:
    tokens = config.train.test_tokens if split == "test" else config.train.eval_tokens
    return shards.parts(split, config.model.seq_len, tokens)


def _eval_batches(config: RunConfig, shards: Shards, split: str) -> Iterator[Batch]:
    tokens = config.train.test_tokens if split == "test" else config.train.eval_tokens
    return shards.eval_batches(split, config.batch_size, config.model.seq_len, tokens)


def reestimation_batches(config: RunConfig, shards: Shards, num_batches: int = 16) -> Iterator[Batch]:
    for i in range(num_batches):
        yield shards.batch(i * config.batch_size, config.batch_size, config.model.seq_len, config.seed)


def evaluate(config: RunConfig, model: LM, shards: Shards, folder: Path) -> dict[str, Any]:
    """Causal test losses by document or part of one (kept in documents.npz, with the document and the group of each),
    the leak of look-ahead routing, routing statistics."""
    parts = _parts(config, shards, "test")
    num_bytes, groups = parts.bytes, shards.groups("test")[parts.docs]
    causal = document_losses(model, _eval_batches(config, shards, "test"))
    nats = np.array([causal.nats[part] for part in range(len(num_bytes))])
    with aside(folder / "documents.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, ids=parts.docs, nats=nats, bytes=num_bytes, groups=groups)
    result: dict[str, Any] = {
        "bpb": causal.bits_per_byte(int(num_bytes.sum())),
        "perplexity": float(np.exp(causal.total / causal.tokens)),
        "test_tokens": causal.tokens,
        "validation_bpb": validation_bpb(config, model, shards),
        "routing": routing_report(causal.stats, causal.passes, causal.tokens),
        "lookahead_bpb": None,
    }
    if config.model.looks_ahead:
        ahead = document_losses(model, _eval_batches(config, shards, "test"), causal=False)
        result["lookahead_bpb"] = ahead.bits_per_byte(int(num_bytes.sum()))
    sample = [batch for _, batch in zip(range(4), _eval_batches(config, shards, "test"), strict=False)]
    result["eval_flops_per_token"] = flops_spent(model, sample)
    return result


def _failure(
    config: RunConfig,
    model: LM,
    optimizer: Optimizer,
    state: checkpoint.TrainState,
    folder: Path,
    line: dict[str, float],
) -> TrainingError:
    """Saves the last good state and says where the numbers went wrong."""
    checkpoint.save(folder / "checkpoints", state, model, optimizer)
    sizes = [f"{name} {float(p.detach().abs().max()):.3g}" for name, p in model.named_parameters() if p.ndim >= 2]
    bad = [name for name, p in model.named_parameters() if not optimizer.is_finite(p)]
    losses = ", ".join(f"{name} {value:.4g}" for name, value in line.items())
    return TrainingError(
        f"step {state.step + 1}: {DIVERGED} ({losses}); gradients not finite in: "
        f"{', '.join(bad[:4]) or 'none'}; largest weights: {', '.join(sizes[:8])}; the state before this step is saved "
        f"in {folder / 'checkpoints'}; lower train.lr={config.train.lr:g} and train anew"
    )
