"""Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, gated feed-forwards; they differ in a few settings."""

import re
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from sparsemix.config import ConfigError
from sparsemix.interop.families.names import llama_name
from sparsemix.model import ModelConfig

READ = frozenset(
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rope_parameters"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        *("hidden_act", "mlp_bias", "rms_norm_eps", "tie_word_embeddings"),
    ]
)
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
ROPE = {"default": None, "linear": "linear", "llama3": "llama3"}
# What a scaling needs, by its name there and here.
ROPE_SETTINGS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_seq_len",
}


def settings(config: PretrainedConfig) -> dict[str, Any]:
    """A model's settings here. Raises ConfigError for what has no equal."""
    kind, D, H = config.model_type, config.hidden_size, config.num_attention_heads
    if config.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={config.hidden_act} must be one of {', '.join(ACTIVATIONS)}")
    d_head = getattr(config, "head_dim", None)
    biased = getattr(config, "attention_bias", False)
    mixer = {
        "kind": "attention",
        "num_heads": H,
        "num_kv_heads": config.num_key_value_heads,
        "d_head": None if d_head is None or d_head * H == D else d_head,
        "bias": "qkv" if kind == "qwen2" else "all" if biased else "none",
        "qk_norm": {"over": "head", "eps": config.rms_norm_eps} if kind == "qwen3" else "none",
        **rope(config.rope_parameters),
    }
    ffn = {
        "kind": "dense",
        "d_ff": config.intermediate_size,
        "activation": ACTIVATIONS[config.hidden_act],
        "bias": getattr(config, "mlp_bias", False),
    }
    return {
        "d_model": D,
        "vocab_size": config.vocab_size,
        "seq_len": config.max_position_embeddings,
        "norm": {"kind": "rms", "eps": config.rms_norm_eps},
        "tie_embeddings": config.tie_word_embeddings,
        "blocks": [{"kind": "block", "mixer": mixer | {"window": w}, "ffn": ffn} for w in windows(config)],
    }


def windows(config: PretrainedConfig) -> list[int | None]:
    """The window of every layer's attention."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if config.model_type in ("llama", "mistral"):
        if kinds is not None:
            raise ConfigError(f"layer_types={kinds[0]},... has no equal in model_type={config.model_type}")
        return [window if config.model_type == "mistral" else None] * config.num_hidden_layers
    assert kinds is not None
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer_types={sorted(unknown)[0]} must be full_attention or sliding_attention")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def rope(given: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling. Raises ConfigError for a scaling that is not known here."""
    kind = given.get("rope_type", "default")
    if kind not in ROPE:
        raise ConfigError(f"rope_type={kind} must be one of {', '.join(ROPE)}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={given['partial_rotary_factor']} must be 1: heads turn whole")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_SETTINGS}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"rope_parameters.{unknown[0]}={given[unknown[0]]} is not known for rope_type={kind}")
    if ROPE[kind] is None:
        return {"rope_theta": given["rope_theta"]}
    needed = {here: given[there] for there, here in ROPE_SETTINGS.items() if there in given}
    if kind == "linear":
        needed = {"factor": given["factor"]}
    return {"rope_theta": given["rope_theta"], "rope_scaling": {"kind": kind, **needed}}


def tensors(found: dict[str, Tensor], config: ModelConfig, names: list[str]) -> dict[str, Tensor]:
    """The checkpoint's tensors by the model's `names`, those left by their own."""
    found = {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": t for name, t in found.items()}
    # Older checkpoints carry the rotary speeds, which the settings already give.
    found = {name: t for name, t in found.items() if not re.search(r"\.rotary_emb\.inv_freq$", name)}
    ours = {llama_name(name): name for name in names}
    return {ours.get(name, name): tensor for name, tensor in found.items()}
