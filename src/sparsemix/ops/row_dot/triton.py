"""Inner products with looked-up table rows: one program takes a block of picks of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_dot(
    x_ptr, ids_ptr, table_ptr, z_ptr, R: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.load(ids_ptr + n * R + r, mask=r < R, other=0) * D
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + n * D + d, mask=d < D, other=0).to(tl.float32)
        inside = (r < R)[:, None] & (d < D)[None, :]
        values = tl.load(table_ptr + row[:, None] + d[None, :], mask=inside, other=0)
        total += values.to(tl.float32) * x[None, :]
    tl.store(z_ptr + n * R + r, tl.sum(total, axis=1), mask=r < R)


def row_dot(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """z_nr = <x_n, table[ids_nr]>."""
    (N, R), D = ids.shape, table.shape[1]
    # Rounded by torch: Triton's interpreter would cut off.
    z = x.new_empty(N, R, dtype=torch.float32)
    if z.numel() and D:
        # A tile of 8,192 numbers: enough bytes under way, without spilling registers.
        block_d = min(triton.next_power_of_2(D), 512)
        block_r = min(triton.next_power_of_2(R), 8192 // block_d, 64)
        grid = (N, triton.cdiv(R, block_r))
        operands = x.contiguous(), ids.long().contiguous(), table, z
        _row_dot[grid](*operands, R, D, block_r, block_d)  # pyright: ignore[reportArgumentType]
        return z.to(x.dtype)
    return x.new_zeros(N, R)
