"""Sums of a table's picks by row on a GPU: one program a row; rows with many picks are cut into pieces first.

Kernels call kernels, which the interpreter finds only if the tests' type checks leave them bare: `no_type_check`."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsemix.ops.row_grad import Order

PIECE = 64


class Pieces(NamedTuple):
    """Sums of the pieces of hot rows: row u's begin at first[u]. Without hot rows nothing is in them."""

    first: Tensor
    sums: Tensor


@triton.jit
@no_type_check
def sum_picks(start, end, pick_ptr, coef_ptr, vec_ptr, R, D, cols, BLOCK: tl.constexpr):
    """Sum of coef[p] * vec[p // R] over the picks at start .. end, in their order."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    i = start
    while i < end:  # the interpreter's range takes no bound that was loaded
        p = tl.load(pick_ptr + i)
        vec = tl.load(vec_ptr + (p // R) * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        total += tl.load(coef_ptr + p).to(tl.float32) * vec
        i += 1
    return total


@triton.jit
@no_type_check
def row_gradient(
    u, start_ptr, pick_ptr, coef_ptr, vec_ptr, first_ptr, sum_ptr, R, D, cols, PIECE: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of the row at place u of the order."""
    start = tl.load(start_ptr + u)
    end = tl.load(start_ptr + u + 1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if end - start > PIECE:
        j = tl.load(first_ptr + u)
        last = j + (end - start + PIECE - 1) // PIECE
        while j < last:
            total += tl.load(sum_ptr + j * D + cols, mask=cols < D, other=0.0)
            j += 1
    else:
        total = sum_picks(start, end, pick_ptr, coef_ptr, vec_ptr, R, D, cols, BLOCK)
    return total


@triton.jit
@no_type_check
def _sum_piece(
    place_ptr,
    first_ptr,
    start_ptr,
    pick_ptr,
    coef_ptr,
    vec_ptr,
    sum_ptr,
    R,
    D,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    u = tl.load(place_ptr + k)
    start = tl.load(start_ptr + u) + (k - tl.load(first_ptr + u)) * PIECE
    end = tl.minimum(start + PIECE, tl.load(start_ptr + u + 1))
    total = sum_picks(start, end, pick_ptr, coef_ptr, vec_ptr, R, D, cols, BLOCK)
    tl.store(sum_ptr + k * D + cols, total, mask=cols < D)


@triton.jit
@no_type_check
def _write_row(
    row_ptr, start_ptr, pick_ptr, coef_ptr, vec_ptr, first_ptr, sum_ptr, out_ptr, R, D,
    PIECE: tl.constexpr, BLOCK: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    g = row_gradient(u, start_ptr, pick_ptr, coef_ptr, vec_ptr, first_ptr, sum_ptr, R, D, cols, PIECE, BLOCK)
    if SQUARES:
        tl.store(out_ptr + u, tl.sum(g * g))
    else:
        tl.store(out_ptr + tl.load(row_ptr + u) * D + cols, g, mask=cols < D)


def block_of(D: int) -> tuple[int, int]:
    """(columns of a program, warps): a program holds a whole row."""
    block = int(triton.next_power_of_2(D))
    return block, min(16, max(1, block // 256))


def factors(order: Order, coef: Tensor, vec: Tensor) -> tuple[tuple[Tensor, ...], Pieces]:
    """(starts, picks, coef, vec) as the kernels take them, and the sums of hot rows' pieces."""
    args = (order.starts, order.picks, coef.contiguous(), vec.contiguous())
    lengths = order.starts.diff()
    counts = torch.where(lengths > PIECE, (lengths + PIECE - 1) // PIECE, 0)
    first, D = counts.cumsum(0) - counts, vec.shape[1]
    place = torch.arange(len(lengths), dtype=torch.long, device=vec.device).repeat_interleave(counts)
    sums = torch.empty(len(place), D, dtype=torch.float32, device=vec.device)
    if len(place):
        block, warps = block_of(D)
        operands = (place, first, *args, sums, coef.shape[1], D, PIECE, block)
        _sum_piece[(len(place),)](*operands, num_warps=warps)  # pyright: ignore[reportCallIssue]
    return args, Pieces(first, sums)


def _by_row(order: Order, coef: Tensor, vec: Tensor, out: Tensor, squares: bool) -> Tensor:
    if len(order.rows):
        args, pieces = factors(order, coef, vec)
        block, warps = block_of(vec.shape[1])
        operands = (order.rows, *args, *pieces, out, coef.shape[1], vec.shape[1], PIECE, block, squares)
        _write_row[(len(order.rows),)](*operands, num_warps=warps)  # pyright: ignore[reportCallIssue]
    return out


def table_grad(order: Order, coef: Tensor, vec: Tensor, num_rows: int) -> Tensor:
    return _by_row(order, coef, vec, vec.new_zeros(num_rows, vec.shape[1]), squares=False)


def row_norm(order: Order, coef: Tensor, vec: Tensor) -> Tensor:
    squares = torch.empty(len(order.rows), dtype=torch.float32, device=vec.device)
    return _by_row(order, coef, vec, squares, squares=True).sum(dtype=torch.float64).sqrt().float()
