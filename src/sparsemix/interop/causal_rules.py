"""What each routed layer of a model does in training and what in evaluation, in words."""

from collections.abc import Callable, Iterator
from typing import Any

from sparsemix.layers import LayerConfig
from sparsemix.model import ModelConfig


def causal_rules(config: ModelConfig) -> list[str]:
    """One sentence for every routed layer, equal ones together."""
    places: dict[str, list[int]] = {}
    for i, block in enumerate(config.blocks):
        for layer in nested(block):
            if (rule := RULES.get(layer.kind)) is not None:
                places.setdefault(rule(layer), []).append(i)
    told = [f"{text} ({block_numbers(where)})" for text, where in places.items()]
    return told or ["No layer routes: every token passes through every weight."]


def nested(layer: LayerConfig) -> Iterator[Any]:
    yield layer
    for child in layer.children():
        yield from nested(child)


def block_numbers(where: list[int]) -> str:
    numbers = sorted(set(where))
    return ("block " if len(numbers) == 1 else "blocks ") + ", ".join(map(str, numbers))


def moe(c: Any) -> str:
    told = f"Mixture of experts: every token picks its {c.top_k} of {c.num_experts} experts by itself"
    if c.capacity_factor is None:
        return f"{told}, in training as in evaluation."
    return f"{told}; in training an expert takes {c.capacity_factor:g} times its even share, in evaluation all."


def expert_choice(c: Any) -> str:
    told = (
        f"Expert choice: in training each of {c.num_experts} experts takes the tokens of a sequence that it scores best"
    )
    return f"{told}; in evaluation those above a running threshold." if c.looks_ahead else f"{told}."


def mode(c: Any) -> str:
    told = f"Mixture of experts and depths: {c.num_experts} experts and {c.num_noop} that do nothing"
    return f"{told}; experts choose in training, running thresholds in evaluation." if c.looks_ahead else f"{told}."


def product_keys(name: str, size: str) -> Callable[[Any], str]:
    def told(c: Any) -> str:
        text = f"{name}: {c.num_heads} heads look up {c.top_k} of {getattr(c, size):,} rows each by product keys"
        if c.query_norm == "batch":
            text += "; queries are normalised by the batch in training, by running statistics in evaluation"
        return f"{text}."

    return told


def mh_moe(c: Any) -> str:
    return f"Multi-head mixture of experts: every token is split into {c.num_heads} sub-tokens, routed one by one."


def mod(c: Any) -> str:
    share = f"{c.capacity:.3g}" if c.capacity <= 1 else f"{c.capacity:g} tokens"
    told = f"Mixture of Depths, capacity {share}, gate {c.gate}: "
    if c.selector == "strided":
        return f"{told}every (1 / capacity)-th position passes, in training as in evaluation."
    if c.selector == "random":
        return f"{told}random tokens pass in training, in evaluation those that a hash of the position picks."
    if c.selector == "token_choice":
        return f"{told}tokens with a score above 0 pass; in training no more than fit, in evaluation all."
    rule = {
        "predictor": "those of which a predictor says so from the token alone",
        "router_bce": "those with a score above 0",
        "threshold": "those with a score above a running threshold",
    }[c.sampling]
    return f"{told}in training the best-scored tokens of a sequence pass, in evaluation {rule}."


RULES: dict[str, Callable[[Any], str]] = {
    "moe": moe,
    "expert_choice": expert_choice,
    "mode": mode,
    "peer": product_keys("PEER", "num_experts"),
    "pkm": product_keys("Product-key memory", "num_values"),
    "mh_moe": mh_moe,
    "mod": mod,
}
