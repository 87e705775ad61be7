"""A language model in the layout of transformers' own classes, experts packed as those classes hold them."""

from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from sparsemix.checkpoint import system_errors
from sparsemix.config import ConfigError, nearest
from sparsemix.data.tokenizer import end_of_text, num_ids
from sparsemix.durable import scratch, sync
from sparsemix.interop.families.folder import WEIGHTS
from sparsemix.interop.families.layouts import ACTIVATIONS, LAYOUTS, misfits
from sparsemix.interop.families.names import llama_name
from sparsemix.layers import AttentionConfig, BlockConfig, DenseConfig, MoEConfig
from sparsemix.model import LM, ModelConfig


def families_of(model: LM) -> list[str]:
    """The families whose classes compute this model's logits."""
    return [family for family, layout in LAYOUTS.items() if not misfits(model, layout)]


def write_decoder(model: LM, folder: Path, family: str, tokenizer: Tokenizer | None = None) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens as that family's class, with equal logits.

    Experts are the class's own `gate_up_proj` (E, 2F, D), gate first, and `down_proj` (E, D, F). Capacities and losses
    are of training and stay behind. Raises ConfigError, nothing written, for what has no equal there."""
    if family not in LAYOUTS:
        raise ConfigError(f"layout={family} must be one of {', '.join(LAYOUTS)}{nearest(family, LAYOUTS)}")
    if odd := misfits(model, LAYOUTS[family]):
        fits = ", ".join(families_of(model))
        way_out = f"what fits is {fits}" if fits else "only the layout of this library holds it"
        raise ConfigError(f"layout={family} has no equal of {'; '.join(odd[:3])}; {way_out}")
    if tokenizer is not None and num_ids(tokenizer) > model.config.vocab_size:
        ids = f"{num_ids(tokenizer)} ids, vocab_size={model.config.vocab_size}"
        raise ConfigError(f"the tokenizer does not match the model: {ids}; give the one it was trained with")
    ending = None if tokenizer is None else end_of_text(tokenizer)
    config = theirs(model.config, family, ending)
    config.dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch(folder) as aside, system_errors(folder):
        aside.mkdir()
        _write(model, aside, config, tokenizer)
        sync(aside)
        folder.mkdir(exist_ok=True)
        # config.json comes last: with it the folder is a model.
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(folder / path.name)


def _write(model: LM, folder: Path, config: PretrainedConfig, tokenizer: Tokenizer | None) -> None:
    parameters = {llama_name(name): p.detach().contiguous().cpu() for name, p in model.named_parameters()}
    save_file(parameters, folder / WEIGHTS, metadata={"format": "pt"})
    ending = config.eos_token_id
    if tokenizer is not None:
        token = tokenizer.id_to_token(ending)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=token, eos_token=token).save_pretrained(folder)
    GenerationConfig(bos_token_id=ending, eos_token_id=ending, pad_token_id=ending).save_pretrained(folder)
    config.save_pretrained(folder)


def theirs(config: ModelConfig, family: str, ending: int | None) -> PretrainedConfig:
    """The settings by their names there."""
    blocks = [block for block in config.blocks if isinstance(block, BlockConfig)]
    mixer = blocks[0].mixer
    assert isinstance(mixer, AttentionConfig)
    layout, d_head = LAYOUTS[family], mixer.head_width(config.d_model)
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.kv_heads,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope(mixer),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ending),
        "architectures": [f"{layout.name}ForCausalLM"],
        **feed_forwards([block.ffn for block in blocks], family),
    }
    if layout.own_head_width:
        settings["head_dim"] = d_head
    if "all" in layout.bias:
        settings["attention_bias"] = mixer.bias == "all"
    windows = [block.mixer.window for block in blocks if isinstance(block.mixer, AttentionConfig)]
    if layout.window != "none":
        settings["sliding_window"] = next((window for window in windows if window), None)
    if family.startswith("qwen"):
        settings["use_sliding_window"] = any(windows)
    if layout.window == "each":
        settings["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    try:
        return getattr(transformers, f"{layout.name}Config")(**settings)
    # Whatever the class's own checks raise, the settings are what it does not take.
    except Exception as error:
        raise ConfigError(f"layout={family}: transformers refuses it ({' '.join(str(error).split())[:200]})") from None


def rope(mixer: AttentionConfig) -> dict[str, Any]:
    """rope_parameters."""
    scaling, base = mixer.rope_scaling, {"rope_theta": mixer.rope_theta}
    if scaling is None:
        return base | {"rope_type": "default"}
    base |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return base
    return base | {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }


def feed_forwards(ffns: list[Any], family: str) -> dict[str, Any]:
    dense = next((ffn for ffn in ffns if isinstance(ffn, DenseConfig)), None)
    moe = next((ffn for ffn in ffns if isinstance(ffn, MoEConfig)), None)
    settings: dict[str, Any] = {"hidden_act": ACTIVATIONS[ffns[0].activation]}
    if dense is not None:
        settings["intermediate_size"] = dense.d_ff
    if family == "llama" and dense is not None:
        settings["mlp_bias"] = dense.bias
    if moe is None:
        return settings
    settings |= {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.balance_weight}
    if family == "qwen3_moe":
        only_dense = [i for i, ffn in enumerate(ffns) if isinstance(ffn, DenseConfig)]
        settings |= {"moe_intermediate_size": moe.d_ff, "mlp_only_layers": only_dense, "decoder_sparse_step": 1}
    else:
        settings["intermediate_size"] = moe.d_ff
    if family != "mixtral":
        settings["norm_topk_prob"] = moe.normalize_gates
    return settings | {"num_local_experts" if family == "mixtral" else "num_experts": moe.num_experts}
