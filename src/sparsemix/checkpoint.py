"""TrainState <-> folder: safetensors, json and their checksums, written aside and renamed. The newest two are kept, so
that one which a disk damaged is not the end of a run."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsemix.durable import aside, damage, delete, seal
from sparsemix.errors import DamagedError

KEPT = 2


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


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    return sorted(folder.glob("step-????????"), reverse=True)


def save(folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write `folder/step-N` unless it is there, then delete all but the newest two, and unfinished ones. Whoever saves
    holds the run's lock, so that nobody else writes here."""
    final = folder / f"step-{state.step:08d}"
    # A run reaches a step in one state only; replacing its checkpoint would leave a moment without any.
    if not final.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with aside(final) as temporary:
            temporary.mkdir()
            _write(temporary, state, model, optimizer)
            seal(temporary)
    kept = steps(folder)[:KEPT]
    for old in folder.iterdir():
        if old not in kept:
            delete(old)


def _write(folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    save_weights(model, folder / "model.safetensors")
    packed = optimizer.state_dict()
    tensors = {f"{i}.{name}": t for i, slots in packed["state"].items() for name, t in slots.items()}
    _save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with system_errors(path):
        save_file(tensors, path)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """What the system refuses to safetensors or tokenizers inside is an OSError of `path`, as it is everywhere else."""
    try:
        yield
    except OSError:
        raise
    # tokenizers has no class of its own for errors.
    except Exception as error:
        # They name the system's error by number only: "... (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, say: Callable[[str], None] = warnings.warn
) -> TrainState:
    """Bring model and optimizer to the newest whole checkpoint and return its state; fresh if there is none at all.

    A damaged one is said, and stays beside the others as `step-N.damaged` until the next is saved. Raises DamagedError
    if every one is: to begin anew without a word would lose what was trained."""
    damaged: dict[Path, str] = {}
    for found in steps(folder):
        if told := damage(found):
            damaged[found] = told
            continue
        for path, why in damaged.items():
            delete(path.with_name(f"{path.name}.damaged"))
            path.rename(path.with_name(f"{path.name}.damaged"))
            say(f"{path} is damaged ({why}); the run goes on from the one before it, {found.name}")
        return _read(found, model, optimizer)
    if damaged:
        each = "; ".join(f"{path.name}: {told}" for path, told in damaged.items())
        raise DamagedError(
            f"{folder} holds no whole checkpoint ({each}); copy a whole one back, or delete {folder} to train the run "
            "from its beginning"
        )
    return TrainState()


def _read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    load_weights(model, folder / "model.safetensors")
    tensors = load_file(folder / "optimizer.safetensors")
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return TrainState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))


def save_weights(model: nn.Module, path: Path) -> None:
    """All parameters and buffers of `model` in one safetensors file."""
    _save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote; every name must be there and fit."""
    model.load_state_dict(load_file(path), strict=True)
