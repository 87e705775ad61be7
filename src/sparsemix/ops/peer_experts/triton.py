"""PEER's experts on a GPU: a program takes a token, and both products pass over the rows of its experts once.

Kernels call kernels, which the interpreter finds only if the tests' type checks leave them bare: `no_type_check`."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsemix.ops.triton_activations import activated, slope

# Bytes of a block of rows of a table, and blocks under way: three programs' fit a Hopper multiprocessor's memory.
BLOCK, STAGES = 16384, 3


@triton.jit
@no_type_check
def _forward(
    x_ptr, ids_ptr, gates_ptr, w_in, w_out, y_ptr, z_ptr, D,
    R: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """z_r = <x, w_in[ids_r]>, y = sum_r gates_r act(z_r) w_out[ids_r] of one token."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    y = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, R, ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        at = (tl.load(ids_ptr + n * R + r, mask=r < R, other=0) * D)[:, None] + d[None, :]
        inside = (r < R)[:, None] & (d < D)[None, :]
        row_in = tl.load(w_in + at, mask=inside, other=0.0).to(tl.float32)
        row_out = tl.load(w_out + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gates_ptr + n * R + r, mask=r < R, other=0.0)
        z = tl.sum(row_in * x[None, :], axis=1)
        tl.store(z_ptr + n * R + r, z, mask=r < R)
        y += tl.sum(row_out * (gate * activated(z, ACT))[:, None], axis=0)
    tl.store(y_ptr + n * D + d, y, mask=d < D)


@triton.jit
@no_type_check
def _backward(
    d_y_ptr, ids_ptr, gates_ptr, z_ptr, w_in, w_out, d_x_ptr, d_gates_ptr, d_z_ptr, coef_ptr, D,
    R: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With s_r = <d_y, w_out[ids_r]>: d_gates_r = s_r act(z_r), d_z_r = s_r gates_r act'(z_r),
    d_x = sum_r d_z_r w_in[ids_r], and coef_r = gates_r act(z_r) of one token."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    d_y = tl.load(d_y_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    d_x = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, R, ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        at = (tl.load(ids_ptr + n * R + r, mask=r < R, other=0) * D)[:, None] + d[None, :]
        inside = (r < R)[:, None] & (d < D)[None, :]
        row_in = tl.load(w_in + at, mask=inside, other=0.0).to(tl.float32)
        row_out = tl.load(w_out + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gates_ptr + n * R + r, mask=r < R, other=0.0)
        z = tl.load(z_ptr + n * R + r, mask=r < R, other=0.0)
        s, a = tl.sum(row_out * d_y[None, :], axis=1), activated(z, ACT)
        d_z = s * gate * slope(z, ACT)
        tl.store(d_gates_ptr + n * R + r, s * a, mask=r < R)
        tl.store(d_z_ptr + n * R + r, d_z, mask=r < R)
        tl.store(coef_ptr + n * R + r, gate * a, mask=r < R)
        d_x += tl.sum(row_in * d_z[:, None], axis=0)
    tl.store(d_x_ptr + n * D + d, d_x, mask=d < D)


def _launch(kernel: Any, operands: tuple, ids: Tensor, table: Tensor, activation: str) -> None:
    (N, R), D = ids.shape, table.shape[1]
    columns = triton.next_power_of_2(D)
    room = BLOCK // (columns * table.element_size())
    rows = max(1, min(triton.next_power_of_2(max(R, 1)), room))
    if N:
        warps = min(8, max(1, rows * columns // 1024))
        kernel[(N,)](*operands, D, R, activation, rows, columns, STAGES if room else 1, num_warps=warps)


def forward(
    x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """y and z. Rounded by torch: Triton's interpreter would cut off."""
    y, z = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format), torch.empty_like(gates)
    operands = x.contiguous(), ids.long().contiguous(), gates.contiguous(), w_in, w_out, y, z
    _launch(_forward, operands, ids, w_in, activation)
    return y.to(x.dtype), z


def backward(
    d_y: Tensor, ids: Tensor, gates: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_x, d_gates, d_z and coef."""
    d_x = torch.empty_like(d_y, dtype=torch.float32, memory_format=torch.contiguous_format)
    d_gates, d_z, coef = (gates.new_empty(gates.shape) for _ in range(3))
    given = d_y.contiguous(), ids.long().contiguous(), gates.contiguous(), z.contiguous(), w_in, w_out
    _launch(_backward, (*given, d_x, d_gates, d_z, coef), ids, w_in, activation)
    return d_x.to(d_y.dtype), d_gates, d_z, coef
