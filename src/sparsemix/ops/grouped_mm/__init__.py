"""Grouped matrix product over rows sorted by expert."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops.grouped_mm import reference as by_expert
from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.precision import autocast
from sparsemix.ops.transforms import check_sizes, transformed

KERNELS = Kernels("grouped_mm", source=Path(__file__).with_name("native.c"), triton=True)


def grouped_mm(
    rows: Float[Tensor, "R D"], weight: Float[Tensor, "E F D"], counts: Int[Tensor, " E"], impl: str = "auto"
) -> Float[Tensor, "R F"]:
    """out_r = weight[e(r)] row_r; rows are sorted by expert and counts says how many each has. Rows after the last
    expert's (sum of counts below R) belong to none: they cost nothing, give 0 and take no gradient. On a CPU counts of
    more than R rows raise ValueError.

    Under autocast rows and weight take the autocast dtype. Differentiable in rows and weight."""
    rows, weight = autocast(rows, weight)
    if transformed():
        check_sizes(counts)
        return by_expert.grouped_mm(rows, weight, counts)
    return torch.ops.sparsemix.grouped_mm(rows, weight, counts, impl)


@torch.library.custom_op("sparsemix::grouped_mm", mutates_args=())
def _forward(rows: Tensor, weight: Tensor, counts: Tensor, impl: str = "auto") -> Tensor:
    check_op("grouped_mm", rows, weight, counts)
    counts = counts.long().contiguous()
    match KERNELS.pick(impl, rows, weight):
        case "reference":
            return by_expert.grouped_mm(rows, weight, counts)
        case "native":
            return _native(rows, weight, counts)
        case "triton":
            from sparsemix.ops.grouped_mm import triton

            return triton.grouped_mm(rows, weight, counts)
    return _torch(rows, weight, counts)


@torch.library.custom_op("sparsemix::grouped_mm_weight_grad", mutates_args=())
def _weight_grad(grad: Tensor, rows: Tensor, counts: Tensor, impl: str = "auto") -> Tensor:
    """dW_e = sum over the rows of expert e of grad_r row_r^T."""
    check_op("grouped_mm_weight_grad", grad, rows, counts)
    counts = counts.long().contiguous()
    match KERNELS.pick(impl, rows, grad):
        case "reference":
            return by_expert.weight_grad(grad, rows, counts)
        case "native":
            out = rows.new_empty(len(counts), grad.shape[1], rows.shape[1])
            dense = (x.contiguous() for x in (grad, rows, counts))
            KERNELS.call("weight_grad", out, *dense, *out.shape, rows.dtype == torch.bfloat16)
            return out
        case "triton":
            from sparsemix.ops.grouped_mm import triton

            return triton.weight_grad(grad, rows, counts)
    return _torch_weight_grad(grad, rows, counts)


def _native(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A turned weight, as backward gives, is read as it lies."""
    turned = not weight.mT.is_contiguous() or weight.is_contiguous()
    matrix = weight.contiguous() if turned else weight.mT
    out = rows.new_empty(len(rows), weight.shape[1])
    sizes = (len(rows), *weight.shape, turned, rows.dtype == torch.bfloat16)
    KERNELS.call("product", out, rows.contiguous(), matrix, counts, *sizes)
    return out


def _torch(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if _fits_torch(rows, weight):
        offsets = counts.cumsum(0).to(torch.int32)
        out = F.grouped_mm(rows, weight.mT, offs=offsets)
        # torch leaves what lies after the last expert's rows unwritten; a GPU must not be asked where that is.
        if rows.is_cuda:
            return out.masked_fill_(
                torch.arange(len(rows), dtype=torch.long, device=rows.device)[:, None] >= offsets[-1], 0
            )
        out[int(offsets[-1]) :] = 0
        return out
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for e, piece, into in _segments(counts, rows, out):
        torch.mm(piece, weight[e].mT, out=into)
    out[int(counts.sum()) :] = 0
    return out


def _torch_weight_grad(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    if _fits_torch(rows, grad):
        offsets = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(grad.mT, rows, offs=offsets)
    out = rows.new_zeros(counts.shape[0], grad.shape[1], rows.shape[1])
    for e, piece, grads in _segments(counts, rows, grad):
        torch.mm(grads.mT, piece, out=out[e])
    return out


def _fits_torch(*operands: Tensor) -> bool:
    """torch's grouped product has no loop of ours, but wants on a GPU bf16, on a CPU anything but fp64, and everywhere
    rows that begin at multiples of 16 bytes."""
    known = (torch.bfloat16,) if operands[0].is_cuda else (torch.float32, torch.bfloat16, torch.float16)
    return all(x.dtype in known and len(x) > 0 and _aligned(x) for x in operands)


def _aligned(x: Tensor) -> bool:
    """Is the last or the last but one axis dense, every other step and the start a multiple of 16 bytes?"""
    strides = list(x.stride())
    dense = 1 if strides[-1] != 1 and strides[-2] == 1 else 0
    strides.pop(-2 if dense else -1)
    wide = x.shape[-2 if dense else -1] * x.element_size() % 16 == 0
    steps = all(step > 0 and step * x.element_size() % 16 == 0 for step in strides)
    return wide and steps and x.data_ptr() % 16 == 0


def _segments(counts: Tensor, *per_row: Tensor):
    start = 0
    for e, count in enumerate(counts.tolist()):
        if count:
            yield e, *(x[start : start + count] for x in per_row)
        start += count


@_forward.register_fake
def _(rows: Tensor, weight: Tensor, counts: Tensor, impl: str = "auto") -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_weight_grad.register_fake
def _(grad: Tensor, rows: Tensor, counts: Tensor, impl: str = "auto") -> Tensor:
    return rows.new_empty(counts.shape[0], grad.shape[1], rows.shape[1])


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    rows, weight, counts = ctx.saved_tensors
    # An expanded gradient (from .sum()) has stride 0, which matrix kernels refuse.
    grad = grad.contiguous()
    d_rows = _forward(grad, weight.mT, counts, ctx.impl) if ctx.needs_input_grad[0] else None
    d_weight = _weight_grad(grad, rows, counts, ctx.impl) if ctx.needs_input_grad[1] else None
    return d_rows, d_weight, None, None


_forward.register_autograd(_backward, setup_context=_save)


def rows_run(rows: Tensor, counts: Tensor) -> int:
    """Rows that some expert runs; where counts has no values (meta and fake tensors), all of them."""
    unknown = counts.is_meta or isinstance(counts, FakeTensor)
    return rows.shape[0] if unknown else int(counts.sum())


@register_flop_formula(torch.ops.sparsemix.grouped_mm, get_raw=True)
def _flops(rows: Tensor, weight: Tensor, counts: Tensor, *args, **kwargs) -> int:
    return 2 * rows_run(rows, counts) * weight.shape[1] * weight.shape[2]


@register_flop_formula(torch.ops.sparsemix.grouped_mm_weight_grad, get_raw=True)
def _weight_grad_flops(grad: Tensor, rows: Tensor, counts: Tensor, *args, **kwargs) -> int:
    return 2 * rows_run(rows, counts) * rows.shape[1] * grad.shape[1]
