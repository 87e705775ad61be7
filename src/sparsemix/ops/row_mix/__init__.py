"""Weighted sums of table rows looked up per token; never forms the gathered [N, R, D] tensor."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops import native
from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.row_grad import rows_gradient
from sparsemix.ops.row_mix import reference
from sparsemix.ops.transforms import transformed

KERNELS = Kernels("row_mix", Path(__file__).with_name("native.c"), triton=True)


def row_mix(
    coef: Float[Tensor, "N R"],
    ids: Int[Tensor, "N R"],
    table: Float[Tensor, "M D"],
    record: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "N D"]:
    """y_n = sum_r coef_nr table[ids_nr]. Differentiable in coef and table; coef takes the table's dtype.

    With `record` the table's gradient is left as factors (ops/row_grad) and `table.grad` stays None."""
    if transformed():
        return reference.row_mix(coef.to(table.dtype), ids, table)
    return torch.ops.sparsemix.row_mix(coef.to(table.dtype), ids, table, record, impl)


@torch.library.custom_op("sparsemix::row_mix", mutates_args=())
def _forward(coef: Tensor, ids: Tensor, table: Tensor, record: bool, impl: str) -> Tensor:
    check_op("row_mix", coef, ids, table)
    ids = ids.long().contiguous()
    picked = KERNELS.pick(impl, coef, table, refused=None if table.is_contiguous() else "the table is not contiguous")
    if picked == "reference":
        return reference.row_mix(coef, ids, table)
    if picked == "triton":
        from sparsemix.ops.row_mix import triton

        return triton.row_mix(coef, ids, table)
    if picked == "native":
        sums = table.new_empty(ids.shape[0], table.shape[1])
        coef = coef.float().contiguous()
        KERNELS.call(native.typed("row_mix", table), coef, ids, table, sums, *ids.shape, table.shape[1])
        return sums
    return F.embedding_bag(ids, table, per_sample_weights=coef.contiguous(), mode="sum")


@_forward.register_fake
def _(coef: Tensor, ids: Tensor, table: Tensor, record: bool, impl: str) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.record, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    coef, ids, table = ctx.saved_tensors
    d_coef = torch.ops.sparsemix.row_dot(grad, ids, table, False, ctx.impl) if ctx.needs_input_grad[0] else None
    d_table = rows_gradient(table, ids, coef, grad, ctx.record) if ctx.needs_input_grad[2] else None
    return d_coef, None, d_table, None, None


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.sparsemix.row_mix)
def _flops(coef_shape, ids_shape, table_shape, *args, **kwargs) -> int:
    return 2 * ids_shape[0] * ids_shape[1] * table_shape[1]
