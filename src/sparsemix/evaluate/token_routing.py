"""What routing did with every token of a text, as plain data: blocks passed, scores and gates, experts."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparsemix.evaluate.per_token import on_tokens, picks_on_tokens
from sparsemix.layers import LayerConfig
from sparsemix.layers.mod import GATES, MoD
from sparsemix.layers.router import NOBODY
from sparsemix.model import LM

# Of a token's experts, those of the largest gates are told; PEER has a hundred and more.
TOLD_EXPERTS = 6


def routed_layers(model: LM) -> list[dict[str, Any]]:
    """Every layer that chooses tokens or experts, in the model's order: `path`, `kind`, `block` (its number), and
    `experts` (how many there are; None for Mixture-of-Depths)."""
    layers = []
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        experts = getattr(config, "num_experts", getattr(config, "num_values", None))
        if isinstance(config, LayerConfig) and (isinstance(module, MoD) or experts is not None):
            kind, block = getattr(config, "kind", None), int(path.split(".")[1])
            layers.append({"path": path, "kind": kind, "block": block, "experts": experts})
    return layers


def token_routing(
    model: LM, tokens: Int[Tensor, "B T"], stats: dict[str, Tensor], row: int = 0
) -> list[dict[str, Any]]:
    """One entry a token of `row`: `blocks`, how many blocks processed it, and `layers`, by path, what each routed layer
    that saw it did: `routed`, `score`, `gate` and perhaps `guess` (the predictor's logit) of Mixture-of-Depths;
    `experts` of the others, for each sub-token pairs of number and gate, the largest first, and `others`, how many more
    took it. `stats` are those of a causal forward of `tokens` in evaluation mode with Ctx(picks=True)."""
    found, _ = on_tokens(stats, tokens.shape)
    picks = picks_on_tokens(stats, found, tokens.shape)
    passed = blocks_passed(model, found, tokens.shape)[row].tolist()
    told: list[dict[str, Any]] = [{"blocks": blocks, "layers": {}} for blocks in passed]
    for layer in routed_layers(model):
        path = layer["path"]
        if f"{path}.routed" in found:
            module = model.get_submodule(path)
            assert isinstance(module, MoD)
            each = _depths({name: found.get(f"{path}.{name}") for name in ("routed", "scores", "guess")}, module, row)
        elif path in picks:
            columns = (values[row].tolist() for values in picks[path])
            each = [_experts(ids, gates) if seen else None for ids, gates, seen in zip(*columns, strict=True)]
        else:
            continue
        for token, said in zip(told, each, strict=True):
            if said is not None:
                token["layers"][path] = said
    return told


def blocks_passed(model: LM, found: dict[str, Tensor], shape: torch.Size) -> Int[Tensor, "B T"]:
    """How many blocks processed each token: all but those that Mixture-of-Depths took it past."""
    device = model.embed.weight.device
    passed = torch.zeros(shape, dtype=torch.long, device=device)
    for i, block in enumerate(model.blocks):
        through, path = torch.ones(shape, dtype=torch.bool, device=device), f"blocks.{i}"
        while isinstance(block, MoD):
            # A wrapper inside one that took no token at all has nothing to say.
            mask = found.get(f"{path}.routed")
            through = through & (mask == 1) if mask is not None else torch.zeros_like(through)
            block, path = block.inner, f"{path}.inner"
        passed += through
    return passed


def _depths(values: dict[str, Tensor | None], module: MoD, row: int) -> list[dict[str, Any] | None]:
    routed, scores = values["routed"], values["scores"]
    assert routed is not None and scores is not None
    gates = GATES[module.config.gate](scores)
    columns = {"routed": routed, "score": scores, "gate": gates, "guess": values["guess"]}
    lists = {name: value[row].tolist() for name, value in columns.items() if value is not None}
    told: list[dict[str, Any] | None] = []
    for i, taken in enumerate(lists["routed"]):
        # NaN: a wrapper around this one took the token past it.
        said = {name: value[i] for name, value in lists.items()} | {"routed": taken == 1}
        told.append(said if taken == taken else None)
    return told


def _experts(expert_ids: list[list[int]], gates: list[list[float]]) -> dict[str, Any]:
    """Of one token: each sub-token's experts."""
    told, others = [], []
    for ids, weights in zip(expert_ids, gates, strict=True):
        # Several heads of PEER may find the same expert, whose gates add up.
        total: dict[int, float] = {}
        for e, gate in zip(ids, weights, strict=True):
            if e != NOBODY:
                total[e] = total.get(e, 0.0) + gate
        ranked = sorted(total.items(), key=lambda pick: (-pick[1], pick[0]))
        told.append([list(pick) for pick in ranked[:TOLD_EXPERTS]])
        others.append(max(0, len(ranked) - TOLD_EXPERTS))
    return {"experts": told, "others": others}
