"""The grouped product and its weight gradient on a GPU: one launch for all experts, any sizes and strides."""

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 64, 64, 32
# The interpreter multiplies the bits of bf16 as integers; fp32 holds the same values.
WIDEN = bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def _product(
    rows, weight, counts, ends, out, num_experts, D, F, row_step, row_d, expert_step, weight_f, weight_d,
    experts_ceil: tl.constexpr, size: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr, precise: tl.constexpr,
    widen: tl.constexpr,
):  # fmt: skip
    # Experts before this block's have all their blocks before it; num_experts of them means that it has no rows.
    block = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, experts_ceil)
    blocks = (tl.load(counts + e, mask=e < num_experts, other=0) + size - 1) // size
    last = tl.cumsum(blocks, axis=0)
    expert = tl.sum(((last <= block) & (e < num_experts)).to(tl.int64), axis=0)
    if expert < num_experts:
        end = tl.load(ends + expert)
        earlier = tl.sum(tl.where(e < expert, blocks, 0), axis=0)
        r = end - tl.load(counts + expert) + (block - earlier) * size + tl.arange(0, size).to(tl.int64)
        f = tl.program_id(1).to(tl.int64) * columns + tl.arange(0, columns)
        sums = tl.zeros((size, columns), tl.float32)
        # `while`, not `range`: the interpreter takes no bounds that are no constants.
        d0 = 0
        while d0 < D:
            d = (d0 + tl.arange(0, depth)).to(tl.int64)
            x_at = rows + r[:, None] * row_step + d[None, :] * row_d
            x = tl.load(x_at, mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
            w_at = weight + expert * expert_step + d[:, None] * weight_d + f[None, :] * weight_f
            w = tl.load(w_at, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0)
            if widen:
                x, w = x.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(x, w, sums, input_precision=precise)
            d0 += depth
        out_at = out + r[:, None] * F + f[None, :]
        tl.store(out_at, sums.to(out.dtype.element_ty), mask=(r < end)[:, None] & (f < F)[None, :])


@triton.jit
def _weight_grad(
    grad, rows, counts, ends, out, D, F, grad_step, grad_f, row_step, row_d,
    size: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr, precise: tl.constexpr,
    widen: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + expert)
    start = end - tl.load(counts + expert)
    f = tl.program_id(1).to(tl.int64) * size + tl.arange(0, size)
    d = tl.program_id(2).to(tl.int64) * columns + tl.arange(0, columns)
    sums = tl.zeros((size, columns), tl.float32)
    while start < end:
        r = start + tl.arange(0, depth).to(tl.int64)
        g_at = grad + r[None, :] * grad_step + f[:, None] * grad_f
        g = tl.load(g_at, mask=(r < end)[None, :] & (f < F)[:, None], other=0.0)
        x_at = rows + r[:, None] * row_step + d[None, :] * row_d
        x = tl.load(x_at, mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
        if widen:
            g, x = g.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(g, x, sums, input_precision=precise)
        start += depth
    out_at = out + expert * F * D + f[:, None] * D + d[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=(f < F)[:, None] & (d < D)[None, :])


def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A program takes a block of one expert's rows and of columns. Where the counts lie is not asked: there are as many
    programs as the most uneven counts need, and those without rows end at once."""
    (R, D), (E, F, _) = rows.shape, weight.shape
    # Rows of no expert stay 0.
    out = rows.new_zeros(R, F)
    if out.numel():
        grid = (-(-R // ROWS) + min(E, R), -(-F // COLUMNS))
        counts = counts.long().contiguous()
        sizes = (E, D, F, *rows.stride(), weight.stride(0), weight.stride(1), weight.stride(2))
        settings = (triton.next_power_of_2(E), ROWS, COLUMNS, DEPTH, "ieee", WIDEN)
        _product[grid](rows, weight, counts, counts.cumsum(0), out, *sizes, *settings)  # pyright: ignore[reportCallIssue]
    return out


def weight_grad(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """A program takes a tile of one expert's matrix and sums over its rows in order."""
    E, F, D = len(counts), grad.shape[1], rows.shape[1]
    out = rows.new_empty(E, F, D)
    if out.numel():
        counts = counts.long().contiguous()
        grid, sizes = (E, -(-F // ROWS), -(-D // COLUMNS)), (D, F, *grad.stride(), *rows.stride())
        _weight_grad[grid](grad, rows, counts, counts.cumsum(0), out, *sizes, ROWS, COLUMNS, DEPTH, "ieee", WIDEN)  # pyright: ignore[reportCallIssue]
    return out
