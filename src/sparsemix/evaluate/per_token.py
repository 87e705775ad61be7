"""What layers say about single tokens, brought back to the tokens of the batch."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
        # A row's tokens stand first and in order; what follows them fills the row.
        real = torch.arange(columns, device=value.device) < seen[seen.any(1)].sum(1, keepdim=True)
        found[name] = torch.full(shape, torch.nan, device=value.device).masked_scatter(seen, value[real])
    return found, rows_per_token


def _seen_by(path: str, found: dict[str, Tensor], shape: torch.Size, device: torch.device) -> Bool[Tensor, "B T"]:
    """The tokens that the innermost Mixture-of-Depths around `path` lets through; all if there is none."""
    masks = [name.removesuffix(".routed") for name in found if name.endswith(".routed")]
    around = max((mask for mask in masks if path.startswith(f"{mask}.")), key=len, default=None)
    if around is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return found[f"{around}.routed"] == 1
