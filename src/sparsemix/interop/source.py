"""A model to convert, wherever it comes from."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from sparsemix import saved, trained
from sparsemix.config import ConfigError
from sparsemix.inputs import expanded
from sparsemix.model import LM

# What Hugging Face's tokenizers read besides tokenizer.json.
BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Source(NamedTuple):
    """A model in evaluation mode on the CPU, its tokenizer, and where both lie."""

    model: LM
    tokenizer: Tokenizer | None
    folder: Path


def read_source(name: str) -> Source:
    """The model of a run's folder, of a saved model's, of a Hugging Face decoder's, or `hf:ORG/NAME` from the Hub.

    Raises ConfigError; nothing is ever unpickled."""
    folder = _from_hub(name) if name.startswith("hf:") else expanded(name)
    if not folder.is_dir():
        raise ConfigError(f"{name}: no such folder; name a model's, a run's, or hf:ORG/NAME")
    if (
        (folder / "config.yaml").is_file()
        or (folder / "plan.yaml").is_file()
        or saved.read_config(folder).get("model_type") == "sparsemix"
    ):
        found = trained.load(folder)
        return Source(found.model.cpu().eval(), found.tokenizer, folder)
    # transformers takes seconds to import, and a model of ours needs none of it.
    from sparsemix.interop.families import read_decoder

    config, tensors, tokenizer = read_decoder(folder)
    model = config.build()
    model.load_state_dict(tensors)
    return Source(model.eval(), tokenizer, folder)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    # Never the pickled weights: what is not fetched cannot be opened.
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    # The Hub and the network can fail in any way, and each is the source's failure.
    try:
        return Path(snapshot_download(name.removeprefix("hf:"), allow_patterns=wanted))
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{name} cannot be fetched ({told}); check the name and the network, or use a folder"
        ) from None
