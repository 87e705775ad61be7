"""GPT-2: LayerNorm, learned positions, plain feed-forwards with biases, matrices stored (d_in, d_out)."""

import re
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from sparsemix.config import ConfigError
from sparsemix.model import ModelConfig

READ = frozenset(
    [
        *("vocab_size", "n_embd", "n_head", "n_layer", "n_inner", "n_positions"),
        *("activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
        "reorder_and_upcast_attn",  # another order of the same sums
    ]
)
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "gelu": "gelu",
    "relu": "relu",
}
TOP = {"wte": "embed", "wpe": "positions", "ln_f": "norm", "lm_head": "lm_head"}
INSIDE = {
    "ln_1": "mixer_norm",
    "ln_2": "ffn_norm",
    "attn.c_proj": "mixer.o",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
}


def settings(config: PretrainedConfig) -> dict[str, Any]:
    """A model's settings here. Raises ConfigError for what has no equal."""
    if config.activation_function not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(f"activation_function={config.activation_function} must be one of {known}")
    mixer = {"kind": "attention", "num_heads": config.n_head, "bias": "all", "rope_theta": None}
    ffn = {
        "kind": "dense",
        "d_ff": 4 * config.n_embd if config.n_inner is None else config.n_inner,
        "activation": ACTIVATIONS[config.activation_function],
        "bias": True,
    }
    return {
        "d_model": config.n_embd,
        "vocab_size": config.vocab_size,
        "seq_len": config.n_positions,
        "learned_positions": config.n_positions,
        "norm": {"kind": "layer", "eps": config.layer_norm_epsilon},
        "tie_embeddings": config.tie_word_embeddings,
        "blocks": [{"kind": "block", "mixer": mixer, "ffn": ffn}] * config.n_layer,
    }


def tensors(found: dict[str, Tensor], config: ModelConfig, names: list[str]) -> dict[str, Tensor]:
    """The checkpoint's tensors by the model's names, those left by their own."""
    ours: dict[str, Tensor] = {}
    for full, tensor in found.items():
        name = full.removeprefix("transformer.")
        # Older checkpoints carry the causal mask.
        if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
            continue
        owner, _, kind = name.rpartition(".")
        inside = re.fullmatch(r"h\.(\d+)\.(.+)", owner)
        if owner in TOP:
            ours[f"{TOP[owner]}.{kind}"] = tensor
        elif inside and inside[2] == "attn.c_attn" and tensor.shape[-1] % 3 == 0:
            for part, third in zip("qkv", tensor.chunk(3, dim=-1), strict=True):
                ours[f"blocks.{inside[1]}.mixer.{part}.{kind}"] = third.T if kind == "weight" else third
        elif inside and inside[2] in INSIDE:
            turned = kind == "weight" and not inside[2].startswith("ln")
            ours[f"blocks.{inside[1]}.{INSIDE[inside[2]]}.{kind}"] = tensor.T if turned else tensor
        else:
            ours[full] = tensor
    return ours
