"""A pre-trained decoder in Hugging Face's layout as settings and weights of the language model here."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig

from sparsemix.config import ConfigError, nearest, parse
from sparsemix.interop.families import folder as files
from sparsemix.interop.families import gpt2, llama
from sparsemix.model import ModelConfig
from sparsemix.saved import read_tokenizer

READERS: dict[str, tuple[str, ModuleType]] = {
    "gpt2": ("GPT2Config", gpt2),
    "llama": ("LlamaConfig", llama),
    "mistral": ("MistralConfig", llama),
    "qwen2": ("Qwen2Config", llama),
    "qwen3": ("Qwen3Config", llama),
}
# Settings of transformers that change no logit: of training, of generation, of other heads.
HARMLESS = frozenset(
    [
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "initializer_range"),
        *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"),
        *(f"summary_{part}" for part in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")),
    ]
)


class Decoder(NamedTuple):
    """`weights` are the state dict of the model that `config` builds, in the checkpoint's dtypes."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None


def read_decoder(folder: Path) -> Decoder:
    """The decoder in a folder that save_pretrained wrote: its logits are those of transformers' own class.

    Every tensor finds its place and every setting that changes a logit is taken over. Raises ConfigError where one
    cannot: another architecture, a setting or a tensor without an equal, pickled or quantised weights."""
    config, family = _settings(folder)
    tokenizer = read_tokenizer(folder, config.vocab_size)
    found = files.read_tensors(folder)
    try:
        weights = placed(found, config, family)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return Decoder(config, weights, tokenizer)


def read_config(folder: Path) -> ModelConfig:
    """The decoder's settings alone, from its config.json. Raises ConfigError."""
    return _settings(folder)[0]


def _settings(folder: Path) -> tuple[ModelConfig, ModuleType]:
    raw = files.read_settings(folder)
    kind = str(raw.get("model_type"))
    if kind not in READERS:
        known = ", ".join(READERS) + nearest(kind, READERS)
        raise ConfigError(f"{folder}: model_type={kind} is none of the decoders read here: {known}")
    class_name, family = READERS[kind]
    path = folder / "config.json"
    try:
        return parse(ModelConfig, family.settings(theirs(raw, class_name, family.READ))), family
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; a decoder with this setting is not read") from None


def theirs(raw: dict[str, Any], class_name: str, read: frozenset[str]) -> PretrainedConfig:
    """config.json with transformers' defaults. Raises ConfigError for a setting that nobody here takes over."""
    if raw.get("quantization_config"):
        raise ConfigError("quantization_config is set: quantised weights are not read; take the model in bf16 or fp32")
    if not raw.get("is_causal", True):
        raise ConfigError("is_causal=False must be true: a decoder sees no later token")
    known = getattr(transformers, class_name)
    try:
        config = known.from_dict(raw)
    # Whatever its checks raise, the file is what is wrong.
    except Exception as error:
        raise ConfigError(f"transformers cannot read it ({' '.join(str(error).split())[:200]})") from None
    own = {field.name for field in dataclasses.fields(PretrainedConfig)}
    plain = known()
    for field in dataclasses.fields(known):
        value = getattr(config, field.name)
        if field.name not in own | read | HARMLESS and value != getattr(plain, field.name):
            raise ConfigError(f"{field.name}={value} has no equal here (known: {getattr(plain, field.name)})")
    return config


def placed(found: dict[str, Tensor], config: ModelConfig, family: ModuleType) -> dict[str, Tensor]:
    """The state dict of the model. Raises ConfigError if a tensor is missing, misshapen or left over."""
    with torch.device("meta"):
        wanted = config.build().state_dict()
    ours = family.tensors(found, config, list(wanted))
    if config.tie_embeddings and "lm_head.weight" in ours:
        head = ours.pop("lm_head.weight")
        if "embed.weight" in ours and not torch.equal(head, ours["embed.weight"]):
            raise ConfigError("tie_word_embeddings=true, but lm_head.weight is not the embedding; set it to false")
    if missing := sorted(wanted.keys() - ours.keys()):
        raise ConfigError(f"the checkpoint has no tensor for {missing[0]} (missing: {len(missing)}); copy it whole")
    if left := sorted(ours.keys() - wanted.keys()):
        raise ConfigError(f"{left[0]} has no place in this decoder (left over: {len(left)}); it is another model")
    for name, like in wanted.items():
        if ours[name].shape != like.shape:
            shapes = f"{tuple(ours[name].shape)} and not {tuple(like.shape)}"
            raise ConfigError(f"the tensor for {name} is {shapes}, as the settings say; restore config.json")
    return {name: ours[name].contiguous() for name in wanted}
