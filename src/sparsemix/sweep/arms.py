"""The runs that are compared: a dense backbone at a width, and what is put in its place."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sparsemix.config import Config, ConfigError, apply_overrides, nearest, parse
from sparsemix.data.shards import DataConfig
from sparsemix.layers import AttentionConfig, BlockConfig, DenseConfig
from sparsemix.layers.sizing import mod_wrap, refuse_unknown, sized_ffn
from sparsemix.layers.ternary import PRECISIONS
from sparsemix.model import ModelConfig
from sparsemix.recipes import settings_of
from sparsemix.settings import RunConfig


class Arm(NamedTuple):
    """One side of a comparison: `kind` as `compare` takes it (`dense`, `moe`, `mod`, `mod+moe`, `moe@ternary`), then
    `changes`, dotted overrides of the result (`model.blocks.wrap.capacity=0.5`, `model.blocks.ffn.top_k=4`).

    rate: times the rule's learning rate, from a sweep or a stated reason. sized: from the dense feed-forward and
    d_model the settings of what replaces it, in place of equal FLOPs (a paper's own sizes do not cost the same)."""

    name: str
    kind: str = "dense"
    changes: tuple[str, ...] = ()
    placement: str = "middle"
    rate: float = 1.0
    sized: Callable[[DenseConfig, int], dict[str, Any]] | None = None


def split_kind(kind: str) -> tuple[bool, str, str | None]:
    """(is there Mixture-of-Depths around blocks, feed-forward kind, precision) of `mod`, `KIND`, `mod+KIND` (staged
    MoDE), each with or without `@precision`. Raises ConfigError."""
    name, at, precision = kind.partition("@")
    if at and precision not in PRECISIONS:
        raise ConfigError(
            f"kinds={kind}: {precision!r} is none of {', '.join(PRECISIONS)}{nearest(precision, PRECISIONS)}"
        )
    wrap, plus, feed = name.partition("+")
    if plus and wrap != "mod":
        raise ConfigError(f"kinds={kind}: only mod wraps blocks; write mod+{feed}")
    if plus and feed == "mod":
        raise ConfigError(f"kinds={kind}: mod wraps blocks once; write mod, or mod+KIND")
    return wrap == "mod", feed if plus else {"mod": "dense"}.get(name, name), precision or None


def refuse_unknown_kinds(kinds: Iterable[str]) -> None:
    """Raises ConfigError for a kind that is none, or that can be no side of a comparison."""
    for kind in kinds:
        if (feed := split_kind(kind)[1]) != "dense":
            refuse_unknown(feed)


def refuse_decided(overrides: tuple[str, ...], decided: Mapping[str, str]) -> None:
    """Raises ValueError for an override of a setting that something else decides (setting -> what), and that would have
    no effect."""
    for override in overrides:
        path, _, text = override.partition("=")
        for setting in _leaves(path.strip(), apply_overrides({}, [f"value={text}"])["value"]):
            if by := decided.get(setting):
                raise ValueError(f"overrides={override} would have no effect: {by} decides {setting}")


def _leaves(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path


def rate_by_rule(d_model: int) -> float:
    """The learning rate without a sweep: 0.01 up to width 64, 0.0035 at 128 (each near the best of a dense sweep).

    Ternary weights get the same: at width 64 their best rate is no other (docs/LOG.md)."""
    return 0.01 * min(1.0, 64 / d_model) ** 1.5


class _Backbone(Config):
    model: ModelConfig


def backbone(recipe: str, overrides: tuple[str, ...] = (), width: int | None = None) -> dict[str, Any]:
    """Raw settings of a dense recipe, at another width if one is given: depth, heads and feed-forward keep their
    proportion to it, everything else stays. Raises ConfigError."""
    raw = settings_of(recipe, overrides)
    model = raw.get("model", {})
    pattern = model.get("blocks")
    if not isinstance(pattern, dict) or {"ffn", "wrap"} & set(pattern):
        raise ConfigError(f"recipe={recipe} must give blocks as count and each, with nothing replaced")
    each = pattern.get("each")
    ffn = each.get("ffn") if isinstance(each, dict) else None
    if (kind := ffn.get("kind") if isinstance(ffn, dict) else None) != "dense":
        raise ConfigError(f"recipe={recipe} must have a dense feed-forward to replace, not {kind}")
    settings = parse(_Backbone, {"model": model}).model
    model |= {"d_model": settings.d_model, "seq_len": settings.seq_len}
    if width is None or width == settings.d_model:
        return raw
    block = settings.blocks[0]
    if not (isinstance(block, BlockConfig) and isinstance(block.mixer, AttentionConfig)):
        raise ConfigError(f"recipe={recipe} must have attention in its blocks")
    assert isinstance(each, dict) and isinstance(block.ffn, DenseConfig)
    was, heads = settings.d_model, block.mixer.num_heads
    # Rotary positions turn pairs of channels, so a head's width is even.
    possible = [h for h in range(1, width + 1) if width % h == 0 and (width // h) % 2 == 0]
    if width < 8 or not possible:
        raise ConfigError(f"sizes={width} must be an even width of at least 8")
    model["d_model"] = width
    pattern["count"] = max(2, round(len(settings.blocks) * width / was))
    each["mixer"]["num_heads"] = min(possible, key=lambda h: (abs(h - heads * width / was), h))
    each["ffn"]["d_ff"] = max(4, 4 * round(block.ffn.d_ff * width / was / 4))
    return raw


def run_config(
    arm: Arm, raw: dict[str, Any], data: DataConfig, budget: float, seed: int = 0, lr: float | None = None
) -> RunConfig:
    """The run of an arm on a backbone's raw settings, sized to equal FLOPs per token with the dense feed-forward that
    it replaces unless the arm says how, at `lr` or the rule's rate times the arm's. Raises ConfigError."""
    raw = apply_overrides(raw, [f"train.budget_flops={budget!r}"])
    wrapped, kind, precision = split_kind(arm.kind)
    model = raw["model"]
    pattern, width = model["blocks"], model["d_model"]
    if precision:
        model["precision"] = precision
    raw["data"] = data.model_dump(mode="json")
    if wrapped:
        pattern["wrap"] = mod_wrap(width)
    if kind != "dense":
        # Staged MoDE has its experts inside the wrapped blocks.
        at = "every-2" if wrapped and arm.placement == "middle" else arm.placement
        ffn = parse(DenseConfig, pattern["each"]["ffn"])
        layer = {"kind": kind, **arm.sized(ffn, width)} if arm.sized else sized_ffn(kind, ffn, width, model["seq_len"])
        pattern["ffn"] = {"at": at, **layer}
    raw["train"]["lr"] = lr if lr is not None else rate_by_rule(width) * arm.rate
    raw["seed"] = seed
    return parse(RunConfig, apply_overrides(raw, list(arm.changes)))
