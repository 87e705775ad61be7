"""The k best of n * n product keys for every query, without keeping the scores of the others."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.product_key_topk import reference, selection
from sparsemix.ops.product_key_topk.selection import candidate_ranks
from sparsemix.ops.row_grad import table_grad
from sparsemix.ops.row_mix import row_mix
from sparsemix.ops.transforms import transformed

KERNELS = Kernels("product_key_topk", source=Path(__file__).with_name("native.c"), triton=True, dtypes=(torch.float32,))
# The longest lists of the Triton kernels, which hold them in registers.
MAX_TRITON_K = 256
# Scores that exist at a time on the torch path: 16 MiB in fp32, whatever the number of tokens.
MAX_SCORES = 2**22


def product_key_topk(
    query: Float[Tensor, "N H 2 C"], keys: Float[Tensor, "*H 2 n C"], k: int, impl: str = "auto"
) -> tuple[Float[Tensor, "N H K"], Float[Tensor, "N H K"], Int[Tensor, "N H K"], Int[Tensor, "N H K"]]:
    """(left, right, i, j): left_k = <query_0, keys_0 i_k>, right_k = <query_1, keys_1 j_k> for the k pairs (i, j)
    with the largest sums, in order of falling sum; ties, NaN and -inf as in `best_pairs`. k <= n * n.

    Keys are (2, n, C) for all heads or (H, 2, n, C). Scores are in at least fp32, whatever autocast says.
    Differentiable through left and right in query and keys; the backward pass reads and writes the picked keys only:
    it costs 8 K C a head and token, the scores cost 4 n C. Source: arXiv:2407.04153, section 2; pruning is ours."""
    exact = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, keys = query.to(exact), keys.to(exact)
        return _plain(query, keys, k) if transformed() else torch.ops.sparsemix.product_key_topk(query, keys, k, impl)


def best_pairs(
    left: Float[Tensor, "*B n"], right: Float[Tensor, "*B n"], k: int, impl: str = "auto"
) -> tuple[Int[Tensor, "*B k"], Int[Tensor, "*B k"]]:
    """(i, j) of the k largest left_i + right_j, largest first, from scores that are there already; k <= n * n."""
    # Called without torch's dispatcher, which would have turned the sign of a negated view.
    left, right, n = left.resolve_neg(), right.resolve_neg(), left.shape[-1]
    check_op("best_pairs", *(side.reshape(side.shape[:-1].numel(), side.shape[-1]) for side in (left, right)))
    _check_k("best_pairs", k, n)
    refused = "Triton kernels take queries, not scores" if impl == "triton" or left.is_cuda else None
    picked = KERNELS.pick(impl, left, right, refused=refused)
    if picked != "native":
        return (reference if picked == "reference" else selection).best_pairs(left, right, k)
    i, j = (torch.empty(*left.shape[:-1], k, dtype=torch.long) for _ in range(2))
    a, b = candidate_ranks(k, min(k, n))
    rows, P = left.shape[:-1].numel(), a.numel()
    KERNELS.call("best_pairs", left.contiguous(), right.contiguous(), rows, n, k, a, b, P, i, j)
    return i, j


def _plain(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In PyTorch's own operations, with the scores of all keys."""
    equation = "nhpc,pmc->pnhm" if keys.ndim == 3 else "nhpc,hpmc->pnhm"
    left, right = torch.einsum(equation, query, keys)  # (N, H, n) each
    # No pair of the k best is made of anything but the k best of each side.
    ranks = [scores.detach().argsort(dim=-1, descending=True, stable=True)[..., :k] for scores in (left, right)]
    best = reference.best_pairs(left.detach().gather(-1, ranks[0]), right.detach().gather(-1, ranks[1]), k)
    i, j = (rank.gather(-1, picked) for rank, picked in zip(ranks, best, strict=True))
    return left.gather(-1, i), right.gather(-1, j), i, j


@torch.library.custom_op("sparsemix::product_key_topk", mutates_args=())
def _forward(query: Tensor, keys: Tensor, k: int, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    too_many = k > MAX_TRITON_K and (impl == "triton" or query.is_cuda)
    check_op("product_key_topk" if keys.ndim == 3 else "product_key_topk_by_head", query, keys)
    _check_k("product_key_topk", k, keys.shape[-2])
    picked = KERNELS.pick(impl, query, keys, refused=f"k={k} exceeds {MAX_TRITON_K}" if too_many else None)
    if picked == "reference":
        return reference.product_key_topk(query, keys, k)
    return {"native": _native, "triton": _triton, "torch": _torch}[picked](query, keys, k)


def _check_k(op: str, k: int, n: int) -> None:
    if not 1 <= k <= n * n:
        raise RuntimeError(f"{op}: k={k} must lie in [1, n * n={n * n}], the number of pairs")


def _outputs(query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*query.shape[:2], k)
    scores = query.new_empty(shape), query.new_empty(shape)
    return *scores, query.new_empty(shape, dtype=torch.long), query.new_empty(shape, dtype=torch.long)


def _native(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, H, _, C = query.shape
    n, out = keys.shape[-2], _outputs(query, k)
    a, b = candidate_ranks(k, min(k, n))
    # With shared keys the heads' queries are as many queries of one head.
    rows, groups = (N * H, 1) if keys.ndim == 3 else (N, H)
    operands = query.contiguous(), keys.contiguous(), rows, groups, n, C, k, a, b, a.numel()
    KERNELS.call("product_key_topk", *operands, *out)
    return out


def _triton(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sparsemix.ops.product_key_topk import triton

    out = _outputs(query, k)
    triton.product_key_topk(query, keys, k, *out)
    return out


def _torch(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, H, n = *query.shape[:2], keys.shape[-2]
    left, right, i, j = out = _outputs(query, k)
    widest = max(2 * n, len(candidate_ranks(k, min(k, n))[0]))
    equation = "nhpc,pmc->pnhm" if keys.ndim == 3 else "nhpc,hpmc->pnhm"
    step = max(1, MAX_SCORES // (H * widest))
    for part in (slice(start, start + step) for start in range(0, N, step)):
        left_scores, right_scores = torch.einsum(equation, query[part], keys)  # (part, H, n) each
        i[part], j[part] = selection.best_pairs(left_scores, right_scores, k)
        left[part], right[part] = left_scores.gather(-1, i[part]), right_scores.gather(-1, j[part])
    return out


@_forward.register_fake
def _(query: Tensor, keys: Tensor, k: int, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(query, k)


def _save(ctx, inputs, output) -> None:
    query, keys, _, ctx.impl = inputs
    ctx.save_for_backward(query, keys, *output[2:])


def _backward(ctx, d_left: Tensor, d_right: Tensor, *_):
    query, keys, i, j = ctx.saved_tensors
    d_query, d_keys = torch.ops.sparsemix.product_key_topk_backward(d_left, d_right, query, keys, i, j, ctx.impl)
    return d_query if ctx.needs_input_grad[0] else None, d_keys if ctx.needs_input_grad[1] else None, None, None


@torch.library.custom_op("sparsemix::product_key_topk_backward", mutates_args=())
def _gradients(
    d_left: Tensor, d_right: Tensor, query: Tensor, keys: Tensor, i: Tensor, j: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """d_query_0 = sum_k d_left_k keys_0 i_k and d_keys_0 i = sum of d_left_k query_0 over the picks of i; side 1 with
    d_right and j."""
    op = "product_key_topk_backward" if keys.ndim == 3 else "product_key_topk_backward_by_head"
    check_op(op, d_left, d_right, query, keys, i, j)
    # Triton's kernels for it are those of rows of a table.
    picked = KERNELS.pick(impl, query, keys, d_left, d_right)
    if picked != "native":
        return _through_rows(d_left, d_right, query, keys, i, j, picked)
    (N, H, _, C), n, groups = query.shape, keys.shape[-2], 1 if keys.ndim == 3 else keys.shape[0]
    d_query, d_keys = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, keys))
    operands = (x.contiguous() for x in (query, keys, d_left, d_right, i.long(), j.long()))
    KERNELS.call("product_key_topk_backward", *operands, N, H, groups, n, C, i.shape[2], d_query, d_keys)
    return d_query, d_keys


def _through_rows(
    d_left: Tensor, d_right: Tensor, query: Tensor, keys: Tensor, i: Tensor, j: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    C = query.shape[3]
    # Both sides (and heads) of the keys as one table, whose blocks of n rows begin at `first`.
    table = keys.reshape(keys.shape[:-1].numel(), C)
    first = torch.arange(0, table.shape[0], keys.shape[-2], dtype=torch.long, device=i.device).view(*keys.shape[:-2], 1)
    rows = (torch.stack([i, j], dim=2) + first).flatten(0, 2)  # (N H 2, K)
    d_scores = torch.stack([d_left, d_right], dim=2).flatten(0, 2)
    d_query = row_mix(d_scores, rows, table, False, impl).view_as(query)
    vec = query.reshape(query.shape[:-1].numel(), C)
    return d_query, table_grad(d_scores, rows, vec, table.shape[0], impl).view_as(keys)


@_gradients.register_fake
def _(
    d_left: Tensor, d_right: Tensor, query: Tensor, keys: Tensor, i: Tensor, j: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.sparsemix.product_key_topk)
def _flops(query_shape, keys_shape, *args, **kwargs) -> int:
    N, H, _, C = query_shape
    return 2 * N * H * 2 * keys_shape[-2] * C


@register_flop_formula(torch.ops.sparsemix.product_key_topk_backward)
def _backward_flops(d_left_shape, d_right_shape, query_shape, *args, **kwargs) -> int:
    N, H, K = d_left_shape
    return 8 * N * H * K * query_shape[3]
