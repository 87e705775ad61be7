"""The k largest of n * n sums, from two lists of n scores."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor


def best_pairs(
    left: Float[Tensor, "*B n"], right: Float[Tensor, "*B n"], k: int
) -> tuple[Int[Tensor, "*B k"], Int[Tensor, "*B k"]]:
    """(i, j) of the k largest left_i + right_j, largest first; ties go to the better left rank, then right rank
    (equal scores of one side rank by index). Exact, k <= n * n.

    Only rank pairs (a, b) with (a + 1)(b + 1) <= k are formed: any other pair has k pairs that are at least as
    good on both sides and so come before it. NaN ranks above every number, so that it is picked and seen; -inf ranks
    last. (Where +inf meets -inf the sum is NaN, and which pairs win is not defined.)"""
    side = min(k, left.shape[-1])
    left_best, i = _stable_topk(left, side)
    right_best, j = _stable_topk(right, side)
    a, b = (ranks.to(left.device) for ranks in candidate_ranks(k, side))
    sums = left_best[..., a] + right_best[..., b]  # (*B, candidates), in (a, b) order
    best = _stable_topk(sums, k)[1]
    return i.gather(-1, a[best]), j.gather(-1, b[best])


@lru_cache
def candidate_ranks(k: int, side: int) -> tuple[Int[Tensor, " C"], Int[Tensor, " C"]]:
    """Rank pairs (a, b), ranks from 0 and below `side`, with (a + 1)(b + 1) <= k, in lexicographic order."""
    pairs = [(a, b) for a in range(side) for b in range(min(side, k // (a + 1)))]
    a, b = torch.tensor(pairs, dtype=torch.long).T
    return a.contiguous(), b.contiguous()


def _stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last axis, equal scores in index order."""
    values, ids = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    # topk leaves the order of ties open; rows that have one are sorted again, stably.
    tied = ((values[..., 1:] == values[..., :-1]) | values[..., 1:].isnan()).any(-1)
    again, order = scores[tied].sort(dim=-1, descending=True, stable=True)
    values[tied], ids[tied] = again[..., : values.shape[-1]], order[..., : ids.shape[-1]]
    return values[..., :k], ids[..., :k]
