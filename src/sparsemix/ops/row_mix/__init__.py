"""Weighted sums of table rows looked up per token; never forms the gathered [N, R, D] tensor."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


def row_mix(coef: Float[Tensor, "N R"], ids: Int[Tensor, "N R"], table: Float[Tensor, "M D"]) -> Float[Tensor, "N D"]:
    """y_n = sum_r coef_nr table[ids_nr]. Differentiable in coef and table; coef takes the table's dtype."""
    return torch.ops.sparsemix.row_mix(coef.to(table.dtype), ids, table)


@torch.library.custom_op("sparsemix::row_mix", mutates_args=())
def _forward(coef: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(ids, table, per_sample_weights=coef.contiguous(), mode="sum")


@torch.library.custom_op("sparsemix::row_table_grad", mutates_args=())
def table_grad(coef: Tensor, ids: Tensor, vec: Tensor, num_rows: int) -> Tensor:
    """G[m] = sum over picks (n, r) with ids_nr = m of coef_nr * vec_n, dense (num_rows, D)."""
    N, R = ids.shape
    bag = torch.arange(N, device=ids.device).repeat_interleave(R)
    weights = coef.reshape(-1).contiguous()
    empty = ids.new_empty(0)
    return torch.ops.aten._embedding_bag_dense_backward(
        vec.contiguous(), ids.reshape(-1), bag, empty, empty, num_rows, False, 0, weights
    )


@_forward.register_fake
def _(coef: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


@table_grad.register_fake
def _(coef: Tensor, ids: Tensor, vec: Tensor, num_rows: int) -> Tensor:
    return vec.new_empty(num_rows, vec.shape[1])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    coef, ids, table = ctx.saved_tensors
    d_coef = torch.ops.sparsemix.row_dot(grad, ids, table) if ctx.needs_input_grad[0] else None
    d_table = table_grad(coef, ids, grad, table.shape[0]) if ctx.needs_input_grad[2] else None
    return d_coef, None, d_table


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.sparsemix.row_mix)
def _flops(coef_shape, ids_shape, table_shape, *args, **kwargs) -> int:
    return 2 * ids_shape[0] * ids_shape[1] * table_shape[1]


@register_flop_formula(torch.ops.sparsemix.row_table_grad)
def _table_grad_flops(coef_shape, ids_shape, vec_shape, *args, **kwargs) -> int:
    return 2 * ids_shape[0] * ids_shape[1] * vec_shape[1]
