"""Which layers can hold a dense feed-forward as copies, at what scale, and what then keeps the logits apart."""

from sparsemix.config import ConfigError
from sparsemix.layers import DenseConfig, ExpertChoiceConfig, LayerConfig, MoDEConfig, MoEConfig, PEERConfig
from sparsemix.layers.linear import GATED

Bank = MoEConfig | MoDEConfig | ExpertChoiceConfig


def refuses(new: LayerConfig, old: DenseConfig) -> str | None:
    """Why a layer of these settings cannot hold the feed-forward; None if it can. Raises ConfigError where other
    settings would let it."""
    if isinstance(new, DenseConfig):
        _same(new, old, *(name for name in type(new).model_fields if name not in ("kind", "precision")))
        return None
    if isinstance(new, Bank):
        if old.bias:
            return "its experts have no bias, the feed-forward has"
        _same(new, old, "activation")
        _sliced(new, old)
        return None
    if isinstance(new, PEERConfig):
        return _peer(new, old)
    return {
        "mh_moe": "a sub-token holds a part of the token only",
        "pkm": "its values do not depend on the token",
    }.get(getattr(new, "kind", ""), "it holds no feed-forward")


def _same(new: LayerConfig, old: DenseConfig, *names: str) -> None:
    for name in names:
        if (got := getattr(new, name)) != (had := getattr(old, name)):
            raise ConfigError(
                f"{name}={got} must be the feed-forward's {had} to copy it; leave it out, or choose init=keep or "
                "init=fresh"
            )


def _sliced(new: Bank, old: DenseConfig) -> None:
    if old.d_ff % new.d_ff:
        raise ConfigError(
            f"d_ff={new.d_ff} must divide the feed-forward's {old.d_ff}, of which each expert copies a slice; choose a "
            "divisor, or init=keep or init=fresh"
        )
    if new.num_experts % num_slices(new, old):
        raise ConfigError(
            f"num_experts={new.num_experts} must be a multiple of the {num_slices(new, old)} slices of {new.d_ff} that "
            f"make up the feed-forward's {old.d_ff}; choose one, or init=keep or init=fresh"
        )


def _peer(new: PEERConfig, old: DenseConfig) -> str | None:
    """Its neurons are those of the feed-forward only where a head reads them all with even gates."""
    if old.activation in GATED:
        return f"its neurons have no gate, those of {old.activation} have"
    if old.bias or old.activation != new.activation:
        return f"its neurons are {new.activation} without bias, other than the feed-forward's"
    if new.gate != "softmax" or new.top_k < new.num_experts or new.num_experts < old.d_ff:
        return (
            f"a head reads top_k={new.top_k} of num_experts={new.num_experts} neurons, the feed-forward its {old.d_ff}"
        )
    return None


def num_slices(new: Bank, old: DenseConfig) -> int:
    """Experts that make up one feed-forward."""
    return old.d_ff // new.d_ff


def scale(new: Bank, old: DenseConfig) -> float:
    """What copies of the last matrix are multiplied by, so that a token's gates sum to 1 over each slice: exactly where
    all its gates sum to 1, at even gates otherwise."""
    G, E = num_slices(new, old), new.num_experts
    if isinstance(new, MoEConfig):
        return G * (1.0 if new.normalize_gates else E / new.top_k)
    if isinstance(new, ExpertChoiceConfig):
        return G / new.share
    if new.routing == "expert_choice":
        return G * new.columns / E / new.share
    # A token's first picks are experts, not no-ops (see `upcycle`).
    return G * (1.0 if new.normalize_gates else new.columns / new.top_k)


def differs(new: LayerConfig, old: DenseConfig, noise: float) -> str | None:
    """Why the logits of copies start apart from those of the feed-forward; None if they start equal."""
    reasons = [*_precision(new, old), *_gates(new, old)]
    if noise:
        reasons.append(f"noise of {noise:g} of a weight's deviation is added")
    return "; ".join(reasons) or None


def _precision(new: LayerConfig, old: DenseConfig) -> list[str]:
    if not isinstance(new, (DenseConfig, MoEConfig, MoDEConfig, ExpertChoiceConfig)):
        return []
    said, ternary, normed = [], new.precision.ternary, new.precision.normed
    if normed != old.precision.normed:
        said.append("the norm before the last matrix is new" if normed else "the norm before the last matrix is gone")
    elif normed and not isinstance(new, DenseConfig) and num_slices(new, old) > 1:
        said.append("every slice has its own norm")
    if ternary and not old.precision.ternary and not new.precision.warmup_steps:
        said.append("weights are rounded to three values at once (precision.warmup_steps lets them begin as they were)")
    if old.precision.ternary and not ternary:
        said.append("weights are no longer rounded to three values")
    return said


def _gates(new: LayerConfig, old: DenseConfig) -> list[str]:
    if isinstance(new, ExpertChoiceConfig):
        if new.share < 1:
            return [f"a token is taken by {new.capacity_factor:g} experts on average, some by none"]
    elif isinstance(new, MoEConfig):
        if not new.normalize_gates and new.top_k < new.num_experts:
            return ["gates do not sum to 1, and the scale makes up for it on average only"]
        if new.top_k % num_slices(new, old):
            return [f"top_k={new.top_k} is no multiple of the {num_slices(new, old)} slices"]
    elif isinstance(new, MoDEConfig):
        if new.routing == "expert_choice":
            return ["a token is taken by some experts on average, by none at times"]
        if not new.normalize_gates:
            return ["gates do not sum to 1, and the scale makes up for it on average only"]
        if new.top_k != num_slices(new, old):
            return ["a later pick may be a no-op"]
    return []
