"""A trained model as a folder that Hugging Face's tools open: weights, tokenizer, generation settings and a card."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import GenerationConfig

from sparsemix import saved, trained
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
    with saved.whole(to) as folder:
        if layout == OWN:
            write_own(model, folder, found.tokenizer)
        else:
            write_decoder(model, folder, layout, found.tokenizer)
            if found.tokenizer is not None:
                wrap_tokenizer(found.tokenizer, model.config.seq_len).save_pretrained(folder)
        saved.seal_model(folder)
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
