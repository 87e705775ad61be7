"""Single-neuron experts that were looked up for each token; never forms a gathered [N, R, D] tensor."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops import native
from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.peer_experts import reference
from sparsemix.ops.row_dot import row_dot
from sparsemix.ops.row_grad import rows_gradient
from sparsemix.ops.row_mix import row_mix
from sparsemix.ops.transforms import transformed

KERNELS = Kernels("peer_experts", Path(__file__).with_name("native.c"), triton=True)
# Activation -> gradient towards z from the one towards act(z). Their order is that of native.c.
GRADIENTS = {
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "silu": torch.ops.aten.silu_backward,
}


def peer_experts(
    x: Float[Tensor, "N D"],
    ids: Int[Tensor, "N R"],
    gates: Float[Tensor, "N R"],
    w_in: Float[Tensor, "M D"],
    w_out: Float[Tensor, "M D"],
    activation: str = "gelu",
    record: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "N D"]:
    """y_n = sum_r gates_nr act(<x_n, w_in[ids_nr]>) w_out[ids_nr], act one of gelu, relu, silu.

    Differentiable in x, gates and both tables. x and y have the tables' dtype; gates and what is made of them stay in
    at least fp32. With `record` the tables' gradients are left as factors (ops/row_grad), their `grad` stays None."""
    gates = gates.to(torch.promote_types(w_in.dtype, torch.float32))
    if transformed():
        return reference.peer_experts(x.to(w_in.dtype), ids, gates, w_in, w_out, activation).to(w_in.dtype)
    y, _ = torch.ops.sparsemix.peer_experts(x.to(w_in.dtype), ids, gates, w_in, w_out, activation, record, impl)
    return y


def _pick(impl: str, w_in: Tensor, w_out: Tensor, gates: Tensor) -> str:
    refused = None
    if not (w_in.is_contiguous() and w_out.is_contiguous()):
        refused = "a table is not contiguous"
    elif gates.dtype != torch.promote_types(w_in.dtype, torch.float32):
        refused = f"gates are kept in at least fp32, not {gates.dtype}"
    return KERNELS.pick(impl, w_in, w_out, refused=refused)


def _kind(activation: str) -> int:
    if activation not in GRADIENTS:
        raise ValueError(f"peer_experts: activation={activation} is none of {', '.join(GRADIENTS)}")
    return list(GRADIENTS).index(activation)


def _call(name: str, table: Tensor, *args: Tensor | int) -> None:
    KERNELS.call(native.typed(name, table), *args)


@torch.library.custom_op("sparsemix::peer_experts", mutates_args=())
def _forward(
    x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, activation: str, record: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """y and the products z = <x, w_in[ids]>."""
    check_op("peer_experts", x, ids, gates, w_in, w_out)
    kind, ids = _kind(activation), ids.long().contiguous()
    picked = _pick(impl, w_in, w_out, gates)
    if picked == "native":
        y, z, coef = torch.empty_like(x, memory_format=torch.contiguous_format), *_like(gates, 2)
        tensors = x.contiguous(), ids, gates.contiguous(), w_in, w_out, y, z, coef
        _call("forward", w_in, *tensors, *ids.shape, x.shape[1], kind)
        return y, z
    if picked == "triton":
        from sparsemix.ops.peer_experts import triton

        return triton.forward(x, ids, gates, w_in, w_out, activation)
    z = row_dot(x, ids, w_in, impl=picked).to(gates.dtype)
    if picked == "reference":
        return reference.peer_experts(x, ids, gates, w_in, w_out, activation), z
    return row_mix(gates * reference.ACTIVATIONS[activation](z), ids, w_out, impl=picked), z


def _like(gates: Tensor, count: int) -> list[Tensor]:
    return [gates.new_empty(gates.shape) for _ in range(count)]


@_forward.register_fake
def _(x, ids, gates, w_in, w_out, activation, record, impl):
    return x.new_empty(x.shape), gates.new_empty(gates.shape)


@torch.library.custom_op("sparsemix::peer_experts_backward", mutates_args=())
def _gradients(
    d_y: Tensor, ids: Tensor, gates: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, activation: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_x, d_gates, d_z, and the coefficients gates * act(z) again, which w_out's gradient takes."""
    check_op("peer_experts_backward", d_y, ids, gates, z, w_in, w_out)
    kind, ids = _kind(activation), ids.long().contiguous()
    picked = _pick(impl, w_in, w_out, gates)
    if picked == "native":
        d_x = torch.empty_like(d_y, memory_format=torch.contiguous_format)
        d_gates, d_z, coef = _like(gates, 3)
        tensors = (
            d_y.contiguous(),
            ids.contiguous(),
            gates.contiguous(),
            z.contiguous(),
            w_in,
            w_out,
            d_x,
            d_gates,
            d_z,
            coef,
        )
        _call("backward", w_in, *tensors, *ids.shape, d_y.shape[1], kind)
        return d_x, d_gates, d_z, coef
    if picked == "triton":
        from sparsemix.ops.peer_experts import triton

        return triton.backward(d_y, ids, gates, z, w_in, w_out, activation)
    d_hidden = row_dot(d_y, ids, w_out, impl=picked).to(gates.dtype)
    hidden = reference.ACTIVATIONS[activation](z)
    d_z = GRADIENTS[activation](d_hidden * gates, z)
    return row_mix(d_z, ids, w_in, impl=picked), d_hidden * hidden, d_z, gates * hidden


@_gradients.register_fake
def _(d_y, ids, gates, z, w_in, w_out, activation, impl):
    return d_y.new_empty(d_y.shape), *_like(gates, 3)


def _save(ctx, inputs, output) -> None:
    x, ids, gates, w_in, w_out, ctx.activation, ctx.record, ctx.impl = inputs
    ctx.save_for_backward(x, ids, gates, w_in, w_out, output[1])


def _backward(ctx, d_y: Tensor, _):
    x, ids, gates, w_in, w_out, z = ctx.saved_tensors
    d_x, d_gates, d_z, coef = torch.ops.sparsemix.peer_experts_backward(
        d_y, ids, gates, z, w_in, w_out, ctx.activation, ctx.impl
    )
    wants, low = ctx.needs_input_grad, w_in.dtype
    d_in = rows_gradient(w_in, ids, d_z.to(low), x, ctx.record) if wants[3] else None
    d_out = rows_gradient(w_out, ids, coef.to(low), d_y, ctx.record) if wants[4] else None
    return d_x if wants[0] else None, None, d_gates if wants[2] else None, d_in, d_out, None, None, None


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula([torch.ops.sparsemix.peer_experts, torch.ops.sparsemix.peer_experts_backward])
def _flops(x_shape, ids_shape, *args, **kwargs) -> int:
    return 4 * ids_shape[0] * ids_shape[1] * x_shape[1]
