"""What layers say about single tokens, brought back to the tokens of the batch."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sparsemix.layers.router import NOBODY

PER_TOKEN = ("top_gate", "routed", "scores", "guess")


def on_tokens(stats: dict[str, Tensor], shape: torch.Size) -> tuple[dict[str, Float[Tensor, "B T"]], dict[str, int]]:
    """(every per-token statistic as (B, T) fp32, NaN where its layer did not see the token; rows per token by name).

    A layer inside Mixture-of-Depths sees the routed tokens alone, and one inside multi-head MoE sees several sub-tokens
    per token, whose mean stands for the token. A statistic whose rows are no whole multiple of its tokens is left out.
    """
    found: dict[str, Tensor] = {}
    rows_per_token: dict[str, int] = {}
    # A wrapper's own path is shorter than that of what it wraps: outer masks are in place before inner ones need them.
    for name in sorted((n for n in stats if n.rpartition(".")[2] in PER_TOKEN), key=lambda n: n.count(".")):
        path = name.rpartition(".")[0]
        seen = _seen_by(path, found, shape, stats[name].device)
        rows, columns = int(seen.any(1).sum()), int(seen.sum(1).max())
        if not rows or stats[name].numel() % (rows * columns):
            continue
        value = stats[name].float().reshape(rows, columns, -1).mean(dim=2)  # (b, C)
        rows_per_token[name] = stats[name].numel() // (rows * columns)
        found[name] = _placed(value, seen, torch.nan)
    return found, rows_per_token


class Picks(NamedTuple):
    """The K experts of each of a token's h sub-tokens (h = 1 outside multi-head MoE), NOBODY where fewer took it, their
    gates, and which tokens the layer saw at all."""

    expert_ids: Int[Tensor, "B T h K"]
    gates: Float[Tensor, "B T h K"]
    seen: Bool[Tensor, "B T"]


def picks_on_tokens(
    stats: dict[str, Tensor], found: dict[str, Float[Tensor, "B T"]], shape: torch.Size
) -> dict[str, Picks]:
    """The picks of every expert layer, by its path; `found` is what `on_tokens` found in the same statistics."""
    picks = {}
    for path in (name.removesuffix(".expert_ids") for name in stats if name.endswith(".expert_ids")):
        expert_ids, gates = stats[f"{path}.expert_ids"], stats[f"{path}.gates"]  # (N, K)
        seen = _seen_by(path, found, shape, expert_ids.device)
        rows, columns = int(seen.any(1).sum()), int(seen.sum(1).max())
        split = (rows, columns, len(expert_ids) // (rows * columns), expert_ids.shape[1])
        placed = _placed(expert_ids.view(split), seen, NOBODY), _placed(gates.float().view(split), seen, 0)
        picks[path] = Picks(*placed, seen)
    return picks


def _placed(
    value: Shaped[Tensor, "b C *rest"], seen: Bool[Tensor, "B T"], missing: float
) -> Shaped[Tensor, "B T *rest"]:
    """Values of the tokens that were seen at their places, `missing` elsewhere. A row's tokens stand first and in
    order; what follows them fills the row."""
    real = torch.arange(value.shape[1], device=value.device) < seen[seen.any(1)].sum(1, keepdim=True)
    placed = value.new_full((*seen.shape, *value.shape[2:]), missing)
    placed[seen] = value[real]
    return placed


def _seen_by(path: str, found: dict[str, Tensor], shape: torch.Size, device: torch.device) -> Bool[Tensor, "B T"]:
    """The tokens that the innermost Mixture-of-Depths around `path` lets through; all if there is none."""
    masks = [name.removesuffix(".routed") for name in found if name.endswith(".routed")]
    around = max((mask for mask in masks if path.startswith(f"{mask}.")), key=len, default=None)
    if around is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return found[f"{around}.routed"] == 1
