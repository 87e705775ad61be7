"""Inner products of tokens with table rows looked up for them; never forms the gathered [N, R, D] tensor."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops import native
from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.row_dot import reference
from sparsemix.ops.row_grad import rows_gradient
from sparsemix.ops.transforms import transformed

KERNELS = Kernels("row_dot", Path(__file__).with_name("native.c"), triton=True)


def row_dot(
    x: Float[Tensor, "N D"],
    ids: Int[Tensor, "N R"],
    table: Float[Tensor, "M D"],
    record: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "N R"]:
    """z_nr = <x_n, table[ids_nr]>. Differentiable in x and table; x takes the table's dtype.

    With `record` the table's gradient is left as factors (ops/row_grad) and `table.grad` stays None."""
    if transformed():
        return reference.row_dot(x.to(table.dtype), ids, table)
    return torch.ops.sparsemix.row_dot(x.to(table.dtype), ids, table, record, impl)


@torch.library.custom_op("sparsemix::row_dot", mutates_args=())
def _forward(x: Tensor, ids: Tensor, table: Tensor, record: bool, impl: str) -> Tensor:
    check_op("row_dot", x, ids, table)
    ids = ids.long().contiguous()
    picked = KERNELS.pick(impl, x, table, refused=None if table.is_contiguous() else "the table is not contiguous")
    if picked == "reference":
        return reference.row_dot(x, ids, table)
    if picked == "triton":
        from sparsemix.ops.row_dot import triton

        return triton.row_dot(x, ids, table)
    if picked == "native":
        dots = x.new_empty(ids.shape, dtype=torch.float32)
        KERNELS.call(native.typed("row_dot", table), x.contiguous(), ids, table, dots, *ids.shape, x.shape[1])
        return dots.to(x.dtype)
    # An embedding bag's gradient towards its per-sample weights is exactly this product.
    N, R = ids.shape
    bag = torch.arange(N, dtype=torch.long, device=ids.device).repeat_interleave(R)
    offsets = torch.arange(0, N * R, R, dtype=torch.long, device=ids.device)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), table, ids.reshape(-1), offsets, bag, 0
    )
    return dots.view(N, R)


@_forward.register_fake
def _(x: Tensor, ids: Tensor, table: Tensor, record: bool, impl: str) -> Tensor:
    return x.new_empty(ids.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.record, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    x, ids, table = ctx.saved_tensors
    d_x = torch.ops.sparsemix.row_mix(grad, ids, table, False, ctx.impl) if ctx.needs_input_grad[0] else None
    d_table = rows_gradient(table, ids, grad, x, ctx.record) if ctx.needs_input_grad[2] else None
    return d_x, None, d_table, None, None


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.sparsemix.row_dot)
def _flops(x_shape, ids_shape, table_shape, *args, **kwargs) -> int:
    return 2 * ids_shape[0] * ids_shape[1] * table_shape[1]
