"""A model's folder: config.json, model.safetensors and, where there is one, the tokenizer's two files."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from sparsemix import __version__
from sparsemix.checkpoint import save_weights, system_errors
from sparsemix.config import ConfigError, parse
from sparsemix.data.tokenizer import load_tokenizer, num_ids, special_tokens
from sparsemix.durable import SEAL, aside, damage, missing, seal, write_atomic
from sparsemix.inputs import load_json, refuse_used, trusted
from sparsemix.layers.packed import is_packed, with_packed_layers
from sparsemix.model import LM, ModelConfig

# Raised when an older library could misread what a newer one writes.
FORMAT = 2
# Of those that this one reads: in format 1 `sub_keys` and `value_vectors` had other names (layers/product_keys.py).
FORMATS = (1, FORMAT)
WEIGHTS = "model.safetensors"
SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json")
# Which of several files holds a tensor, as Hugging Face's tools write it.
INDEX = f"{WEIGHTS}.index.json"


class Saved(NamedTuple):
    """A model in evaluation mode, on the CPU, and its tokenizer."""

    model: LM
    tokenizer: Tokenizer | None


def write(model: LM, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the folder and the checksums of its files; files of other names in it stay. A packed model
    (layers/packed.py) is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    # Until the new ones are written there are none: a folder that was half replaced must not be taken for damaged.
    (folder / SEAL).unlink(missing_ok=True)
    with aside(folder / WEIGHTS) as temporary:
        save_weights(model, temporary)
    if tokenizer is not None:
        write_atomic(folder / "tokenizer.json", tokenizer.to_str())
        told = tokenizer_settings(tokenizer, model.config.seq_len)
        write_atomic(folder / "tokenizer_config.json", json.dumps(told, indent=1))
    write_atomic(folder / "config.json", json.dumps(settings_file(model.config, tokenizer), indent=1))
    seal_model(folder)


def seal_model(folder: Path) -> None:
    """Write the checksums of what `read` trusts in a model's folder."""
    weights = [path.name for path in _weight_files(folder)]
    seal(folder, sorted({*weights, *(name for name in (INDEX, *SETTINGS) if (folder / name).is_file())}))


def check(path: Path) -> None:
    """Raises ConfigError where a file of a model's folder is not what was written with its checksums. A folder without
    any, which other tools or earlier versions wrote, is taken as it is; what is missing is said by who needs it."""
    folder = path.parent
    if path.is_file() and (folder / SEAL).is_file() and (told := damage(folder, [path.name])):
        raise ConfigError(
            f"{folder} is damaged: {told}; copy it anew, or, if you changed it yourself, delete {folder / SEAL}"
        )


@contextmanager
def whole(to: Path) -> Iterator[Path]:
    """A folder that becomes `to` at the end, or vanishes. Raises ConfigError where there is something already."""
    refuse_used(to)
    made = missing(to.absolute().parent)
    to.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside(to) as folder, system_errors(to):
            folder.mkdir()
            yield folder
    finally:
        # Where nothing came to be, neither do the folders above it; one that holds something stays.
        with suppress(OSError):
            for each in made:
                each.rmdir()


def settings_file(config: ModelConfig, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """What config.json holds: the model's settings, the names by which Hugging Face finds its class, and the ids that
    its generation needs."""
    tokens = {} if tokenizer is None else special_tokens(tokenizer)
    return {
        **{f"{name}_id": tokenizer.token_to_id(token) for name, token in tokens.items() if tokenizer is not None},
        "model_type": "sparsemix",
        "architectures": ["SparsemixForCausalLM"],
        "format": FORMAT,
        "sparsemix_version": __version__,
        "settings": config.model_dump(mode="json"),
    }


def tokenizer_settings(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """What Hugging Face's tokenizer needs beside tokenizer.json to give the same ids as here."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens(tokenizer),
        "padding_side": "left",
        "model_max_length": max_length,
        # `<|endoftext|>` written out in a text is text, as it was in training.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def read(folder: Path) -> Saved:
    """What `write` wrote, or Hugging Face's save_pretrained of the same model; a packed one is read packed, in the
    numbers of its file. Nothing in it is ever unpickled.

    Raises ConfigError: no such folder, other settings, damaged weights, a tokenizer of another size."""
    config, tensors = read_settings(folder), tensors_of(folder)
    if is_packed(tensors):
        # Built without numbers: as floats they would take sixteen times the memory.
        with torch.device("meta"):
            model = config.build()
        with_packed_layers(model)
        _fill(model, tensors, folder, assign=True)
    else:
        model = config.build()
        _fill(model, tensors, folder)
    return Saved(model.eval(), read_tokenizer(folder, config.vocab_size))


def read_settings(folder: Path) -> ModelConfig:
    """The settings in a folder's config.json. Raises ConfigError."""
    path, raw = folder / "config.json", read_config(folder)
    if raw.get("model_type") != "sparsemix":
        raise ConfigError(
            f"{path}: model_type={raw.get('model_type')} must be sparsemix; `sparsemix convert` reads other decoders"
        )
    if raw.get("format") not in FORMATS:
        wrote = raw.get("sparsemix_version", "another version")
        raise ConfigError(
            f"{path}: format={raw.get('format')} must be at most {FORMAT}, which this version ({__version__}) reads; "
            f"it was written by {wrote}: install that one"
        )
    if not isinstance(raw.get("settings"), dict):
        raise ConfigError(f"{path} holds no settings; restore what was written")
    try:
        return parse(ModelConfig, raw["settings"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder, whoever wrote it. Raises ConfigError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no model: it has no config.json; name a run's folder or a model's")
    check(path)
    return load_json(path)


def load_weights(model: LM, folder: Path) -> None:
    """Fill `model` from the folder's safetensors, one file or several; every name must be there and fit. Raises
    ConfigError."""
    _fill(model, tensors_of(folder), folder)


def _fill(model: LM, tensors: dict[str, Tensor], folder: Path, assign: bool = False) -> None:
    check_finite(tensors, folder / WEIGHTS)
    try:
        model.load_state_dict(tensors, strict=True, assign=assign)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder / WEIGHTS} does not fit the settings beside it ({told})") from None


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises ConfigError that names the first tensor with a number that is not finite: every answer of such a model is
    no number, whatever it is asked."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        # PyTorch does not ask 8-bit numbers for it.
        finite = torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float())
        if not bool(finite.all()):
            count = int((~finite).sum())
            raise ConfigError(
                f"{path}: {count} of {tensor.numel()} numbers of {name} are not finite; restore the file, or train "
                "anew with a lower train.lr"
            )


def fingerprint(folder: Path) -> str:
    """SHA-256 over the folder's weight files: names the weights. Raises ConfigError if one is missing."""
    total = hashlib.sha256()
    for path in _weight_files(folder):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    names = [WEIGHTS]
    if index.is_file():
        check(index)
        with trusted(index):
            names = sorted({str(name) for name in load_json(index)["weight_map"].values()})
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds no trained model: {name} is missing; finish the run, or copy it whole")
    return [folder / name for name in names]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """What the folder's files hold, by the names that our model gives it. Raises ConfigError."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        check(path)
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged ({error}); write it anew or copy it whole") from None
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The folder's tokenizer; None if it has none. Raises ConfigError if it needs more ids than the model has."""
    if not (folder / "tokenizer.json").is_file():
        return None
    check(folder / "tokenizer.json")
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    if num_ids(tokenizer) > vocab_size:
        raise ConfigError(
            f"{folder / 'tokenizer.json'} does not match the model: it has {num_ids(tokenizer)} ids, "
            f"vocab_size={vocab_size}; restore the one that was written with the weights"
        )
    return tokenizer
