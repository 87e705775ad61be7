"""A trained model wherever it lies: a run's folder, its model/, or an exported one."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from sparsemix import saved
from sparsemix.config import ConfigError, config_hash, parse
from sparsemix.data import Shards
from sparsemix.data.tokenizer import load_tokenizer
from sparsemix.machine import pick_device
from sparsemix.model import LM
from sparsemix.run import Run
from sparsemix.settings import RunConfig


class Trained(NamedTuple):
    """A model in evaluation mode on this machine's device, its tokenizer, and, where a run's folder was named, the
    run's settings and result."""

    model: LM
    tokenizer: Tokenizer | None
    config: RunConfig | None = None
    result: dict[str, Any] | None = None


def load(folder: Path) -> Trained:
    """The model of a run's folder or of a model's folder. Raises ConfigError."""
    if (folder / "plan.yaml").is_file():
        raise ConfigError(f"{folder} holds a comparison; name the folder of one of its runs")
    if not (folder / "config.yaml").is_file():
        model, tokenizer = saved.read(folder)
        return Trained(model.to(pick_device()), tokenizer)
    run = Run(folder)
    run.check()
    config = parse(RunConfig, run.settings)
    return Trained(load_run(folder, config), run_tokenizer(folder, config), config, run.result)


def load_run(folder: Path, config: RunConfig) -> LM:
    """The trained model of a run's folder. Raises ConfigError if it is unfinished or damaged."""
    if not (folder / "model" / saved.WEIGHTS).is_file():
        raise ConfigError(f"{folder} holds no trained model; finish the run with the command that started it")
    model = config.model.build(config.seed)
    saved.load_weights(model, folder / "model")
    return model.to(pick_device()).eval()


def run_tokenizer(folder: Path, config: RunConfig, data: Path | None = None) -> Tokenizer | None:
    """The run's tokenizer: beside its weights, in its data, or the named one. Raises ConfigError."""
    if (own := saved.read_tokenizer(folder / "model", config.model.vocab_size)) is not None:
        return own
    # Runs of earlier versions have it in their data alone.
    if (shards := find_shards(folder, config, data)) is not None:
        return shards.tokenizer()
    return None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)


def find_shards(folder: Path, config: RunConfig, data: Path | None) -> Shards | None:
    """The data that the run was trained on: in `data`, or where `compare`, `train` or a study put it. Raises
    ConfigError."""
    name = config_hash(config.data.replace(fingerprint=None))
    parent = folder.resolve().parent
    places = [data] if data is not None else [parent / "data", parent / f"data-{name}", parent.parent / "data"]
    for place in places:
        if data is None and not (place / "manifest.json").is_file():
            continue
        shards = Shards.open(place)
        if config.data.fingerprint in (None, shards.manifest["fingerprint"]):
            return shards
        if data is not None:
            raise ConfigError(f"data={data} is not what {folder} was trained on; name the folder that it read")
    return None
