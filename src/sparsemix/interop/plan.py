"""What every block of a decoder becomes: settings alone, no weights."""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from sparsemix.config import Config, ConfigError, nearest, parse
from sparsemix.interop.copies import differs, refuses
from sparsemix.layers import BesideConfig, BlockConfig, DenseConfig, LayerConfig, MoDConfig
from sparsemix.layers.sizing import nearest_sizes, predictor_width
from sparsemix.model import ModelConfig
from sparsemix.patterns import places

FEEDS = ("dense", "moe", "mode", "expert_choice", "mh_moe", "peer", "pkm")
How = Literal["copied", "kept", "fresh"]


class ConvertConfig(Config):
    """What a conversion changes; with neither `ffn` nor `mod` nothing.

    ffn: settings of the layer that takes the feed-forwards' places, `kind` among them; what is left out follows the
    feed-forward (width, activation, precision). layers: `middle`, `every`, `every-N` or block numbers. noise: standard
    deviation of what is added to every copied weight, as a share of the weight's own. mod: settings of Mixture-of-
    Depths around blocks, and `every`: which ones."""

    ffn: dict[str, Any] | None = None
    layers: str | tuple[int, ...] = "every"
    init: Literal["upcycle", "keep", "fresh"] = "upcycle"
    noise: float = Field(default=0.0, ge=0)
    mod: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "ConvertConfig":
        kind = None if self.ffn is None else self.ffn.get("kind")
        known = f"is none of {', '.join(FEEDS)}{nearest(kind, FEEDS)}"
        if self.ffn is not None and kind not in FEEDS:
            raise ValueError(f"ffn={kind} {known}")
        self.rule(not self.noise or self.init == "upcycle", "noise", "is added to copies: it needs init=upcycle")
        return self


class Swap(NamedTuple):
    """A feed-forward that gives its place away. `why` says what keeps a copy from being one, or the logits apart."""

    block: int
    how: How
    why: str | None
    old: LayerConfig
    new: LayerConfig
    added: LayerConfig


class Plan(NamedTuple):
    """The settings of the converted model, the feed-forwards that change, and the blocks wrapped in `mod`."""

    model: ModelConfig
    swaps: tuple[Swap, ...]
    wrapped: tuple[int, ...]


def plan(model: ModelConfig, settings: ConvertConfig) -> Plan:
    """Raises ConfigError."""
    blocks, swaps, wrapped = list(model.blocks), [], ()
    if settings.ffn is not None:
        for i in _places(settings.layers, len(blocks)):
            old = ffn_of(blocks[i], i)
            swap = _swap(i, old, settings.ffn, settings, model.d_model)
            swaps.append(swap)
            blocks[i] = _with_ffn(blocks[i], lambda swap=swap: swap.new)
    if settings.mod is not None:
        wrap = dict(settings.mod)
        every = wrap.pop("every", 2)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"mod.every={every} must be a whole number of at least 1")
        wrapped = tuple(places(f"every-{every}", len(blocks)))
        if not wrapped:
            raise ConfigError(f"mod.every={every} wraps no block: the model has {len(blocks)}; lower it")
        for i in wrapped:
            blocks[i] = _wrapped(blocks[i], i, wrap, model.d_model)
    return Plan(model.replace(blocks=tuple(blocks)), tuple(swaps), wrapped)


def _places(layers: str | tuple[int, ...], count: int) -> list[int]:
    if isinstance(layers, str) and re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*,?", layers):
        layers = tuple(int(part) for part in layers.split(",") if part)
    try:
        found = sorted(set(places(layers, count)))
    except ConfigError as error:
        raise ConfigError(f"layers{str(error).removeprefix('at')}") from None
    if not found:
        raise ConfigError(f"layers={layers} names no block: the model has {count}")
    return found


def ffn_of(block: LayerConfig, at: int) -> LayerConfig:
    """The feed-forward of a block, which Mixture-of-Depths may wrap. Raises ConfigError."""
    while isinstance(block, MoDConfig):
        block = block.inner
    if not isinstance(block, BlockConfig):
        kind = getattr(block, "kind", "unknown")
        raise ConfigError(f"layers={at}: {kind} is no block with a feed-forward; choose other layers")
    return block.ffn


def ffn_path(block: LayerConfig) -> str:
    """Where the feed-forward lies below its block: `ffn`, or `inner.ffn` inside Mixture-of-Depths."""
    path = "ffn"
    while isinstance(block, MoDConfig):
        path, block = f"inner.{path}", block.inner
    return path


def _with_ffn(block: LayerConfig, ffn: Callable[[], LayerConfig]) -> LayerConfig:
    if isinstance(block, MoDConfig):
        return block.replace(inner=_with_ffn(block.inner, ffn))
    return block.replace(ffn=ffn())


def _swap(i: int, old: LayerConfig, ffn: dict[str, Any], settings: ConvertConfig, d_model: int) -> Swap:
    if settings.init == "upcycle" and not isinstance(old, DenseConfig):
        kind = getattr(old, "kind", "unknown")
        raise ConfigError(
            f"init=upcycle copies a dense feed-forward, and that of block {i} is {kind}; choose other layers, "
            "init=keep or init=fresh"
        )
    try:
        new = parse(LayerConfig, _filled(ffn, old, d_model))
        if settings.init == "fresh":
            return Swap(i, "fresh", None, old, new, new)
        reason = None
        if settings.init == "upcycle":
            assert isinstance(old, DenseConfig)
            reason = refuses(new, old)
            if reason is None:
                return Swap(i, "copied", differs(new, old, settings.noise), old, new, new)
        return Swap(i, "kept", reason, old, *_beside(old, new))
    except ConfigError as error:
        raise ConfigError(f"ffn: {error}") from None


def _beside(old: LayerConfig, new: LayerConfig) -> tuple[LayerConfig, LayerConfig]:
    """The settings of both together, and of the layer that is added: as a shared expert where that says the same."""
    if "shared_d_ff" in type(new).model_fields and isinstance(old, DenseConfig):
        sharing = new.replace(shared_d_ff=old.d_ff)
        if sharing.shared == old and new.shared in (None, old):  # type: ignore[attr-defined]
            return sharing, sharing
    return BesideConfig(kept=old, added=new), new


def _filled(ffn: dict[str, Any], old: LayerConfig, d_model: int) -> dict[str, Any]:
    """The settings with those that were left out: what may hold copies follows the feed-forward, what cannot is sized
    to its FLOPs."""
    if not isinstance(old, DenseConfig):
        return ffn
    given, kind = old.model_dump(mode="json"), ffn["kind"]
    if kind in ("mh_moe", "peer", "pkm"):
        sizes = nearest_sizes(kind, old, d_model)
        if kind == "mh_moe":
            sizes["precision"] = sizes["inner"]["precision"] = given["precision"]
        return {**sizes, **ffn}
    same = {"d_ff": old.d_ff, "activation": old.activation, "precision": given["precision"]}
    experts = {"num_experts": 8, "normalize_gates": True}
    noops = {} if ffn.get("routing") == "expert_choice" else {"normalize_gates": True}
    defaults: dict[str, dict[str, Any]] = {
        "dense": {name: given[name] for name in given if name != "kind"},
        "moe": {"top_k": 2, **experts, **same},
        "mode": {"num_experts": 8, "num_noop": 2, "top_k": 1, **noops, **same},
        "expert_choice": {"num_experts": 8, "capacity_factor": 2.0, **same},
    }
    return {**defaults[kind], **ffn}


def _wrapped(block: LayerConfig, at: int, wrap: dict[str, Any], d_model: int) -> LayerConfig:
    """Mixture-of-Depths that starts as the block alone: every token passes, with a gate of 1."""
    if isinstance(block, MoDConfig):
        raise ConfigError(f"mod: block {at} is wrapped already; choose another `every`")
    defaults = {"gate": "two_sigmoid", "anneal_steps": 1000, "predictor_width": predictor_width(d_model)}
    try:
        config = parse(LayerConfig, {**defaults, **wrap, "kind": "mod", "inner": block})
    except ConfigError as error:
        raise ConfigError(f"mod: {error}") from None
    assert isinstance(config, MoDConfig)
    start = {"gate": "two_sigmoid", "block_output": "delta", "selector": "expert_choice"}
    for name, value in start.items():
        if (got := getattr(config, name)) != value:
            raise ConfigError(f"mod.{name}={got} does not start as the block alone; leave it out ({value})")
    if config.sampling == "router_bce":
        raise ConfigError("mod.sampling=router_bce would start with no token; leave it out (predictor)")
    if not config.anneal_steps and config.capacity != 1:
        raise ConfigError("mod.anneal_steps=0 would start at the goal; give the steps in which it falls to it")
    return config
