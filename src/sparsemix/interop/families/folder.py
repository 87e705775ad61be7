"""What a Hugging Face model folder holds: its settings and its tensors. Nothing in it is ever unpickled."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsemix import saved
from sparsemix.config import ConfigError
from sparsemix.inputs import load_json, trusted

WEIGHTS = "model.safetensors"


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json as it is written. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; download the model first and name the folder it is in")
    return saved.read_config(folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors, one file or all shards of its index. Raises ConfigError."""
    tensors: dict[str, Tensor] = {}
    for name in _files(folder):
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{folder}: {name} is missing; copy the model whole")
        saved.check(path)
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged ({error}); copy it anew") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ConfigError(
                f"{folder}: {name} is {tensor.dtype}: quantised weights are not read; take the model in bf16 or fp32"
            )
    saved.check_finite(tensors, folder)
    return tensors


def _files(folder: Path) -> list[str]:
    index = folder / saved.INDEX
    if index.is_file():
        saved.check(index)
        with trusted(index):
            return sorted(set(load_json(index)["weight_map"].values()))
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if pickles := sorted(path.name for path in folder.glob("*.bin*")):
        raise ConfigError(
            f"{folder}: {pickles[0]} is a pickle, which may run any code and is not opened; take the model's "
            "safetensors files, or where you trust it let transformers save it anew (save_pretrained writes them)"
        )
    raise ConfigError(f"{folder} holds no weights: {WEIGHTS} is missing; copy the model whole")
