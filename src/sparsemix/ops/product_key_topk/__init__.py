"""The k best of n * n product keys for every query, without keeping the scores of the others."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops.product_key_topk.selection import best_pairs, candidate_ranks
from sparsemix.ops.row_grad import table_grad
from sparsemix.ops.row_mix import row_mix

# Scores that exist at a time: 16 MiB in fp32, whatever the number of tokens.
MAX_SCORES = 2**22


def product_key_topk(
    query: Float[Tensor, "N H 2 C"], keys: Float[Tensor, "*H 2 n C"], k: int
) -> tuple[Float[Tensor, "N H K"], Float[Tensor, "N H K"], Int[Tensor, "N H K"], Int[Tensor, "N H K"]]:
    """(left, right, i, j): left_k = <query_0, keys_0 i_k>, right_k = <query_1, keys_1 j_k> for the k pairs (i, j)
    with the largest sums, in order of falling sum; ties, NaN and -inf as in `best_pairs`. k <= n * n.

    Keys are (2, n, C) for all heads or (H, 2, n, C). Scores are in at least fp32, whatever autocast says.
    Differentiable through left and right in query and keys; the backward pass reads and writes the picked keys only:
    it costs 8 K C a head and token, the scores cost 4 n C. Source: arXiv:2407.04153, section 2; pruning is ours."""
    exact = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return torch.ops.sparsemix.product_key_topk(query.to(exact), keys.to(exact), k)


@torch.library.custom_op("sparsemix::product_key_topk", mutates_args=())
def _forward(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, H, n = *query.shape[:2], keys.shape[-2]
    left, right = query.new_empty(N, H, k), query.new_empty(N, H, k)
    i, j = (query.new_empty(N, H, k, dtype=torch.long) for _ in range(2))
    widest = max(2 * n, len(candidate_ranks(k, min(k, n))[0]))
    equation = "nhpc,pmc->pnhm" if keys.ndim == 3 else "nhpc,hpmc->pnhm"
    step = max(1, MAX_SCORES // (H * widest))
    for part in (slice(start, start + step) for start in range(0, N, step)):
        left_scores, right_scores = torch.einsum(equation, query[part], keys)  # (part, H, n) each
        i[part], j[part] = best_pairs(left_scores, right_scores, k)
        left[part], right[part] = left_scores.gather(-1, i[part]), right_scores.gather(-1, j[part])
    return left, right, i, j


@_forward.register_fake
def _(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*query.shape[:2], k)
    scores = query.new_empty(shape), query.new_empty(shape)
    return *scores, query.new_empty(shape, dtype=torch.long), query.new_empty(shape, dtype=torch.long)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], *output[2:])


def _backward(ctx, d_left: Tensor, d_right: Tensor, *_):
    query, keys, i, j = ctx.saved_tensors
    C = query.shape[3]
    # Both sides (and heads) of the keys as one table, whose blocks of n rows begin at `first`.
    table = keys.reshape(-1, C)
    first = torch.arange(0, table.shape[0], keys.shape[-2], device=i.device).view(*keys.shape[:-2], 1)
    rows = (torch.stack([i, j], dim=2) + first).flatten(0, 2)  # (N H 2, K)
    d_scores = torch.stack([d_left, d_right], dim=2).flatten(0, 2)
    d_query = row_mix(d_scores, rows, table).view_as(query) if ctx.needs_input_grad[0] else None
    d_keys = None
    if ctx.needs_input_grad[1]:
        d_keys = table_grad(d_scores, rows, query.reshape(-1, C), table.shape[0]).view_as(keys)
    return d_query, d_keys, None


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.sparsemix.product_key_topk)
def _flops(query_shape, keys_shape, *args, **kwargs) -> int:
    N, H, _, C = query_shape
    return 2 * N * H * 2 * keys_shape[-2] * C
