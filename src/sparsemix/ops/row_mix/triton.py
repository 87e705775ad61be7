"""Weighted sums of looked-up table rows: one program takes a block of columns of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_mix(
    coef_ptr, ids_ptr, table_ptr, y_ptr, R: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        row = tl.load(ids_ptr + n * R + r, mask=r < R, other=0) * D
        coef = tl.load(coef_ptr + n * R + r, mask=r < R, other=0).to(tl.float32)
        inside = (r < R)[:, None] & (d < D)[None, :]
        values = tl.load(table_ptr + row[:, None] + d[None, :], mask=inside, other=0)
        total += values.to(tl.float32) * coef[:, None]
    tl.store(y_ptr + n * D + d, tl.sum(total, axis=0), mask=d < D)


def row_mix(coef: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """y_n = sum_r coef_nr table[ids_nr]."""
    (N, R), D = ids.shape, table.shape[1]
    # Rounded by torch: Triton's interpreter would cut off.
    y = table.new_empty(N, D, dtype=torch.float32)
    if y.numel() and R:
        # A tile of 4,096 numbers: its sums stay in registers over the loop.
        block_d = min(triton.next_power_of_2(D), 512)
        block_r = min(triton.next_power_of_2(R), 4096 // block_d)
        grid = (N, triton.cdiv(D, block_d))
        operands = coef.contiguous(), ids.long().contiguous(), table, y
        _row_mix[grid](*operands, R, D, block_r, block_d)  # pyright: ignore[reportArgumentType]
        return y.to(table.dtype)
    return table.new_zeros(N, D)
