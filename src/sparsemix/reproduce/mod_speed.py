"""Training steps of several models in turn, so that what the machine does beside them falls on all alike."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from sparsemix.checkpoint import TrainState
from sparsemix.config import config_hash
from sparsemix.data import Shards
from sparsemix.durable import write_atomic
from sparsemix.inputs import checked_json, read_mapping, trusted
from sparsemix.machine import own_threads, pick_compile, pick_device, pick_dtype, use_threads
from sparsemix.provenance import hardware
from sparsemix.reproduce.base import Lab
from sparsemix.settings import RunConfig
from sparsemix.step import block_runner
from sparsemix.train import train_step, training_batches

WARM_UP, ROUNDS, MOST_S = 3, 60, 60.0


class Speed(NamedTuple):
    """Seconds of a training step of each model, one a round; a round's steps follow each other."""

    seconds: dict[str, list[float]]
    hardware: str

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, base: str, resamples: int = 2000) -> tuple[float, list[float]]:
        """Median over the rounds of one model's seconds over another's in the same round, with a 95 % interval from
        resampled rounds."""
        ratios = np.array(self.seconds[name]) / np.array(self.seconds[base])
        drawn = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
        low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
        return float(np.median(ratios)), [float(low), float(high)]


def step_times(lab: Lab, configs: Mapping[str, RunConfig]) -> Speed:
    """The steps of these models by turns, in an order that turns, kept in the study's folder."""
    names = "-".join(dict.fromkeys(map(config_hash, configs.values())))
    path = lab.out / "step-times" / f"{names}.json"
    if path.is_file():
        with trusted(path):
            kept = Speed(**read_mapping(path, "delete it to have it measured again"))
            if set(kept.seconds) == set(configs):
                return kept
    lab.say(f"step times of {', '.join(configs)}, by turns")
    speed = Speed(_measured(lab, configs), hardware())
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, checked_json(speed._asdict()))
    return speed


def _measured(lab: Lab, configs: Mapping[str, RunConfig]) -> dict[str, list[float]]:
    shards = Shards.open(lab.data)
    with own_threads():
        # As many as the runs had, whose speed this is about.
        use_threads(None, next((run.result.get("threads") for run in lab.all()), None))
        steps = {name: _step(config, shards) for name, config in configs.items()}
        for _ in range(WARM_UP):
            for step in steps.values():
                step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        began, order = time.monotonic(), list(steps)
        for done in range(ROUNDS):
            if done >= 5 and time.monotonic() - began > MOST_S:
                break
            for name in order:
                seconds[name].append(steps[name]())
            order = order[1:] + order[:1]
    return seconds


def _step(config: RunConfig, shards: Shards) -> Callable[[], float]:
    """A function that trains the model one step further and says how many seconds that took."""
    t, device = config.train, pick_device()
    model = config.model.build(config.seed).to(device).train()
    optimizer = t.build_optimizer(model)
    batches = training_batches(config, shards, TrainState(), device)
    run = block_runner(model, pick_compile(t.compile, t.budget_flops, device), t.recompute_blocks)
    dtype = pick_dtype(t.dtype, device)

    def step() -> float:
        micro = [next(batches) for _ in range(t.accumulation)]
        began = time.perf_counter()
        train_step(config, model, optimizer, micro, dtype, run)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step
