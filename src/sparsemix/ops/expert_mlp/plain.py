"""The same through grouped products and PyTorch's own kernels, forward and backward."""

from functools import partial

import torch
from torch import Tensor

from sparsemix.ops.expert_mlp.reference import ACTS

SLOPES = {
    "relu": lambda grad, x: grad * (x > 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}


def forward(
    tokens: Tensor,
    token_ids: Tensor,
    gates: Tensor,
    counts: Tensor,
    first: Tensor,
    down: Tensor,
    act: str,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """y (N, D), and pre (R, M) if `keep`."""
    product = torch.ops.sparsemix.grouped_mm
    pre = product(tokens.index_select(0, token_ids), first, counts, impl)
    gate, *up = pre.split(down.shape[2], dim=-1)
    hidden = ACTS[act](gate) * up[0] if up else ACTS[act](gate)
    rows = product(hidden, down, counts, impl)
    y = sum_by_token(rows * gates[:, None].to(rows.dtype), token_ids, tokens)
    return y, pre if keep else pre.new_empty(0, pre.shape[1])


def backward(
    dy: Tensor,
    pre: Tensor,
    tokens: Tensor,
    token_ids: Tensor,
    gates: Tensor,
    counts: Tensor,
    first: Tensor,
    down: Tensor,
    act: str,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of tokens, gates, first and down; empty ones where `needs` says no."""
    product, weight_grad = torch.ops.sparsemix.grouped_mm, torch.ops.sparsemix.grouped_mm_weight_grad
    d_rows = dy.index_select(0, token_ids)  # (R, D)
    d_hidden = product(d_rows, down.mT, counts, impl)  # before the gate
    gate, *up = pre.split(down.shape[2], dim=-1)
    a = ACTS[act](gate)
    hidden = a * up[0] if up else a
    d_gates = (d_hidden * hidden).sum(dim=1, dtype=torch.promote_types(dy.dtype, torch.float32)).to(gates.dtype)
    scale = gates[:, None].to(dy.dtype)
    d_hidden = d_hidden * scale
    d_gate = SLOPES[act](d_hidden * up[0] if up else d_hidden, gate)
    d_pre = torch.cat([d_gate, d_hidden * a], dim=1) if up else d_gate
    d_tokens, d_first, d_down = (dy.new_empty(0) for _ in range(3))
    if needs[0]:
        d_tokens = sum_by_token(product(d_pre, first.mT, counts, impl), token_ids, tokens)
    if needs[1]:
        d_first = weight_grad(d_pre, tokens.index_select(0, token_ids), counts, impl)
    if needs[2]:
        d_down = weight_grad(d_rows, hidden * scale, counts, impl)
    return d_tokens, d_gates, d_first, d_down


def sum_by_token(rows: Tensor, token_ids: Tensor, tokens: Tensor) -> Tensor:
    """Rows added up by token, in a fixed order: on a GPU index_add would add in any."""
    y = torch.zeros_like(tokens)
    return y.index_put_((token_ids,), rows, accumulate=True) if y.is_cuda else y.index_add_(0, token_ids, rows)
