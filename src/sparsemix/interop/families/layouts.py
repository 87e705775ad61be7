"""Which models transformers' own classes can hold, and what stands in the way of the others."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sparsemix.layers import AttentionConfig, BlockConfig, DenseConfig, LayerConfig, MoEConfig
from sparsemix.model import LM, ModelConfig

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}


@dataclass(frozen=True)
class Layout:
    """`name` begins the classes' names. window: one for all layers, or for each layer the same or none."""

    name: str
    ffn: tuple[str, ...]
    bias: tuple[str, ...] = ("none",)
    qk_norm: Literal["none", "head", "full"] = "none"
    window: Literal["none", "all", "each"] = "none"
    normalize_gates: tuple[bool, ...] = (True, False)
    dense_bias: tuple[bool, ...] = (False,)
    own_head_width: bool = True


LAYOUTS = {
    "llama": Layout("Llama", ("dense",), bias=("none", "all"), dense_bias=(False, True)),
    "mistral": Layout("Mistral", ("dense",), window="all"),
    "qwen2": Layout("Qwen2", ("dense",), bias=("qkv",), window="each", own_head_width=False),
    "qwen3": Layout("Qwen3", ("dense",), bias=("none", "all"), qk_norm="head", window="each"),
    "mixtral": Layout("Mixtral", ("moe",), window="all", normalize_gates=(True,)),
    "olmoe": Layout("Olmoe", ("moe",), bias=("none", "all"), qk_norm="full", own_head_width=False),
    "qwen3_moe": Layout("Qwen3Moe", ("moe", "dense"), bias=("none", "all"), qk_norm="head", window="all"),
}


def misfits(model: LM, layout: Layout) -> list[str]:
    """What of the model has no equal there, one sentence each; empty where it fits whole."""
    config = model.config
    odd = [*_of_blocks(config)]
    if odd:
        return odd
    blocks = [block for block in config.blocks if isinstance(block, BlockConfig)]
    mixers = [block.mixer for block in blocks if isinstance(block.mixer, AttentionConfig)]
    feeds = [block.ffn for block in blocks if isinstance(block.ffn, (DenseConfig, MoEConfig))]
    odd += _of_model(config, blocks, mixers)
    for i, mixer in enumerate(mixers):
        odd += [f"blocks.{i}.mixer.{text}" for text in _of_mixer(mixer, config.d_model, layout)]
    for i, ffn in enumerate(feeds):
        odd += [f"blocks.{i}.ffn.{text}" for text in _of_ffn(ffn, layout)]
        bias = getattr(model.blocks[i].ffn, "bias", None)
        if bias is not None and bool((bias != bias[0]).any()):
            odd.append(f"blocks.{i}.ffn.bias_rate={getattr(ffn, 'bias_rate', None)} has moved what picks the experts")
    odd += _unlike("mixer", [mixer.replace(window=None).model_dump() for mixer in mixers])
    for kind in layout.ffn:
        odd += _unlike("ffn", [_seen(ffn) for ffn in feeds if ffn.kind == kind])
    if "moe" in layout.ffn and not any(ffn.kind == "moe" for ffn in feeds):
        odd.append("a model without a moe")
    if len({ffn.activation for ffn in feeds}) > 1:
        odd.append("feed-forwards of several activations")
    windows = {mixer.window for mixer in mixers}
    if layout.window == "none" and windows != {None}:
        odd.append(f"window={max(w for w in windows if w)}")
    if len(windows - {None} if layout.window == "each" else windows) > 1:
        odd.append(f"windows that differ ({', '.join(sorted(map(str, windows)))})")
    return odd


def kind_of(config: LayerConfig) -> str:
    return type(config).model_fields["kind"].default


def _of_blocks(config: ModelConfig) -> Iterator[str]:
    for i, block in enumerate(config.blocks):
        if not isinstance(block, BlockConfig):
            yield f"blocks.{i}.kind={kind_of(block)}"
        else:
            if not isinstance(block.mixer, AttentionConfig):
                yield f"blocks.{i}.mixer.kind={kind_of(block.mixer)}"
            if not isinstance(block.ffn, (DenseConfig, MoEConfig)):
                yield f"blocks.{i}.ffn.kind={kind_of(block.ffn)}"


def _of_model(config: ModelConfig, blocks: list[BlockConfig], mixers: list[AttentionConfig]) -> Iterator[str]:
    norms = [config.norm, *(block.norm for block in blocks)]
    if any(norm.kind != "rms" for norm in norms):
        yield "norm=layer"
    eps = {norm.eps for norm in norms} | {mixer.qk_norm.eps for mixer in mixers if mixer.qk_norm.over != "none"}
    if len(eps) > 1:
        yield f"norms of several eps ({', '.join(map(str, sorted(eps)))})"
    if config.learned_positions:
        yield f"learned_positions={config.learned_positions}"


def _of_mixer(mixer: AttentionConfig, d_model: int, layout: Layout) -> Iterator[str]:
    if mixer.precision.ternary or mixer.precision.normed:
        yield f"precision={mixer.precision}"
    if mixer.bias not in layout.bias:
        yield f"bias={mixer.bias}"
    if mixer.qk_norm.over != layout.qk_norm:
        yield f"qk_norm={mixer.qk_norm.over}"
    if mixer.rope_theta is None:
        yield "rope_theta=null"
    if not layout.own_head_width and mixer.head_width(d_model) * mixer.num_heads != d_model:
        yield f"d_head={mixer.d_head}"


def _of_ffn(ffn: DenseConfig | MoEConfig, layout: Layout) -> Iterator[str]:
    if ffn.kind not in layout.ffn:
        yield f"kind={ffn.kind}"
    if ffn.precision.ternary or ffn.precision.normed:
        yield f"precision={ffn.precision}"
    if ffn.activation not in ACTIVATIONS:
        yield f"activation={ffn.activation}"
    if isinstance(ffn, DenseConfig) and ffn.bias not in layout.dense_bias:
        yield f"bias={ffn.bias}"
    if isinstance(ffn, MoEConfig) and ffn.shared_d_ff:
        yield f"shared_d_ff={ffn.shared_d_ff}"
    if isinstance(ffn, MoEConfig) and ffn.normalize_gates not in layout.normalize_gates:
        yield f"normalize_gates={ffn.normalize_gates}"


def _seen(ffn: DenseConfig | MoEConfig) -> dict[str, Any]:
    """What a feed-forward computes with once it is trained: all its settings but those of losses and capacity."""
    training = {"balance_weight", "balance_picks", "z_weight", "bias_rate", "capacity_factor"}
    return ffn.model_dump(exclude=training)


def _unlike(part: str, dumps: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The settings in which layers differ that must be alike there."""
    dumps = list(dumps)
    for name in dumps[0] if dumps else ():
        if any(dump[name] != dumps[0][name] for dump in dumps):
            yield f"{part}.{name} that differs between blocks"
