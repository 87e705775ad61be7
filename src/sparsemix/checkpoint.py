"""TrainState <-> folder: safetensors and json, written aside and renamed, so a kill leaves the old one or the new."""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass
class TrainState:
    """Where a run stands. `cursor` counts the sequences taken from the data; flops and wall_s are what was spent;
    dtype, compiled and threads were picked at its start (None: not yet); kernels, versions and peak_memory_bytes are
    those of all processes that trained it."""

    step: int = 0
    cursor: int = 0
    flops: float = 0.0
    wall_s: float = 0.0
    dtype: str | None = None
    compiled: bool | None = None
    threads: int | None = None
    kernels: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    peak_memory_bytes: int = 0


def save(folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write `folder/step-N` unless it is there, then delete older checkpoints and unfinished ones."""
    final = folder / f"step-{state.step:08d}"
    # A run reaches a step in one state only; replacing its checkpoint would leave a moment without any.
    if not final.exists():
        temporary = folder / f".step-{state.step:08d}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, state, model, optimizer)
        temporary.rename(final)
    for old in folder.glob("*step-*"):
        if old.name != final.name:
            shutil.rmtree(old)


def _write(folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    save_weights(model, folder / "model.safetensors")
    packed = optimizer.state_dict()
    tensors = {f"{i}.{name}": t for i, slots in packed["state"].items() for name, t in slots.items()}
    _save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # It names the system's error by number only: "... (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error from None


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Bring model and optimizer to the newest checkpoint and return its state; fresh if there is none."""
    newest = max(folder.glob("step-*"), default=None)
    if newest is None:
        return TrainState()
    load_weights(model, newest / "model.safetensors")
    tensors = load_file(newest / "optimizer.safetensors")
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return TrainState(**json.loads((newest / "state.json").read_text(encoding="utf-8")))


def save_weights(model: nn.Module, path: Path) -> None:
    """All parameters and buffers of `model` in one safetensors file."""
    _save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote; every name must be there and fit."""
    model.load_state_dict(load_file(path), strict=True)
