"""A trained model as a folder that Hugging Face's tools open: weights, tokenizer, generation settings and a card."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GenerationConfig

from sparsemix import trained
from sparsemix.config import ConfigError, nearest
from sparsemix.interop.card import model_card
from sparsemix.interop.families import LAYOUTS, write_decoder
from sparsemix.interop.hf import SparsemixForCausalLM, wrap_tokenizer
from sparsemix.model import LM

OWN = "sparsemix"


def export(source: Path, to: Path, layout: str = OWN) -> None:
    """Write the model of a run's folder, or of a model's folder, to a new folder `to`, all of it or nothing.

    The layout `sparsemix` holds every model; the others are transformers' own classes, for models that have an equal
    there. Raises ConfigError."""
    if layout != OWN and layout not in LAYOUTS:
        known = (OWN, *LAYOUTS)
        raise ConfigError(f"layout={layout} must be one of {', '.join(known)}{nearest(layout, known)}")
    found = trained.load(source)
    model = found.model.cpu()
    with whole(to) as folder:
        if layout == OWN:
            write_own(model, folder, found.tokenizer)
        else:
            write_decoder(model, folder, layout, found.tokenizer)
            if found.tokenizer is not None:
                wrap_tokenizer(found.tokenizer, model.config.seq_len).save_pretrained(folder)
        card = model_card(model, layout, to.name, source, found.config, found.result)
        card.save(folder / "README.md")


def write_own(model: LM, folder: Path, tokenizer: Tokenizer | None) -> None:
    """The library's own layout, as SparsemixForCausalLM.save_pretrained writes it."""
    ids = {}
    if tokenizer is not None:
        wrapped = wrap_tokenizer(tokenizer, model.config.seq_len)
        wrapped.save_pretrained(folder)
        ids = {name: getattr(wrapped, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hf_model = SparsemixForCausalLM.wrap(model, **ids)
    hf_model.generation_config = GenerationConfig(**ids)
    hf_model.eval().save_pretrained(folder)


@contextmanager
def whole(to: Path) -> Iterator[Path]:
    """A folder that becomes `to` at the end, or vanishes. Raises ConfigError where there is something already."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"to={to} is not empty; name a new folder")
    aside = to.absolute().parent / f".{to.name}.{os.getpid()}"
    aside.mkdir(parents=True)
    try:
        yield aside
        if to.exists():
            to.rmdir()
        aside.rename(to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
