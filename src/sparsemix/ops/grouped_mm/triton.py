"""The grouped product and its weight gradient on a GPU: one launch for all experts, any sizes and strides, rows read
where they lie.

Kernels call kernels, which the interpreter finds only if the tests' type checks leave them bare: `no_type_check`."""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter multiplies the bits of bf16 as integers and cuts fp32 off to bf16: it is given fp32, and torch rounds.
INTERPRETED = bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]
TILES_AT_ONCE = 64


class Tiling(NamedTuple):
    """A program's rows and columns, the depth of one step, its warps, and the steps whose operands are under way."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def blocks(self) -> tuple[int, int, int]:
        return self.rows, self.columns, self.depth

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


class Tiles(NamedTuple):
    """Tile t holds rows table[1, t] .. table[2, t] of expert table[0, t], at most `rows` of them or none."""

    rows: int
    table: Tensor

    @property
    def num(self) -> int:
        return self.table.shape[1]


def tiling(rows: int, F: int, D: int, dtype: torch.dtype, held: int = 1) -> Tiling:
    """For products of depth D and width F, of which a program holds so many. By sizes alone: a timed search could
    choose otherwise in the next process, and with it the order of sums."""
    exact, fp32 = dtype == torch.float32 and precision() == "ieee", dtype == torch.float32
    columns = max(16, min(int(triton.next_power_of_2(F)), (64 if exact else 128) // held))
    depth = max(16, min(int(triton.next_power_of_2(D)), 32 if fp32 else 64))
    return Tiling(rows, columns, depth, 8 if rows * columns * held >= 128 * 128 else 4, 3 if rows >= 128 else 4)


def rows_of_a_tile(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """As many as the mean expert has; a tensor core takes 16 at least, a Hopper warp group 64."""
    most = 64 if dtype == torch.float32 and precision() == "ieee" else 128
    return max(16, min(int(triton.next_power_of_2(-(-num_rows // max(1, num_experts)))), most))


def precision() -> str:
    """fp32 products are exact unless torch was told otherwise (torch.set_float32_matmul_precision)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def room(like: Tensor, *shape: int) -> Tensor:
    """Memory for results in the dtype of `like`; of the interpreter's, torch makes that dtype afterwards."""
    return like.new_empty(shape, dtype=torch.float32 if INTERPRETED else like.dtype)


@triton.jit
@no_type_check
def _lay(counts, table, num_tiles, num_experts, CEIL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # One program an expert; the one after the last gives what is left of the table no rows.
    e = tl.program_id(0).to(tl.int64)
    other = tl.arange(0, CEIL)
    before = tl.load(counts + other, mask=(other < e) & (other < num_experts), other=0)
    row = tl.sum(before, axis=0)
    tile = tl.sum((before + ROWS - 1) // ROWS, axis=0)
    count = tl.load(counts + e, mask=e < num_experts, other=0)
    end = row + count
    last = tl.where(e < num_experts, tile + (count + ROWS - 1) // ROWS, num_tiles)
    while tile < last:
        step = tl.arange(0, BLOCK).to(tl.int64)
        inside = tile + step < last
        tl.store(table + tile + step, e, mask=inside)
        tl.store(table + num_tiles + tile + step, row + step * ROWS, mask=inside)
        tl.store(table + 2 * num_tiles + tile + step, end, mask=inside)
        tile += BLOCK
        row = tl.minimum(row + BLOCK * ROWS, end)


def lay(counts: Tensor, num_rows: int, dtype: torch.dtype) -> Tiles:
    """Which rows of which expert a tile has, decided on the device: there are as many tiles as the most uneven counts
    need, and those without rows end at once."""
    E = len(counts)
    rows = rows_of_a_tile(num_rows, E, dtype)
    table = counts.new_empty(3, -(-num_rows // rows) + min(E, num_rows), dtype=torch.long)
    if table.numel():
        sizes = table.shape[1], E, triton.next_power_of_2(max(E, 1)), rows, TILES_AT_ONCE
        _lay[(E + 1,)](counts.long().contiguous(), table, *sizes)  # pyright: ignore[reportArgumentType]
    return Tiles(rows, table)


@triton.jit
@no_type_check
def place(table, num_tiles, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The expert, rows, end of the rows, and columns of this program; programs side by side share rows."""
    wide: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    at = table + program // wide
    r = tl.load(at + num_tiles) + tl.arange(0, ROWS).to(tl.int64)
    f = (program % wide) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    return tl.load(at), r, tl.load(at + 2 * num_tiles), f


@triton.jit
@no_type_check
def tile_product(
    x, w, rows_in, columns_in, x_d, w_d,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """sum_d x[r, d] w[f, d], from pointers to the first entry of every row of x and of w."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH).to(tl.int64)
        left = tl.load(x[:, None] + d[None, :] * x_d, mask=rows_in[:, None] & (d < D)[None, :], other=0.0)
        right = tl.load(w[None, :] + d[:, None] * w_d, mask=columns_in[None, :] & (d < D)[:, None], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISE)
    return sums


@triton.jit
@no_type_check
def _product(
    rows, ids, weight, scale, out, table, num_tiles, row_step, row_d, expert_step, weight_f, weight_d,
    F: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    e, r, end, f = place(table, num_tiles, F, ROWS, COLUMNS)
    if tl.min(r, axis=0) < end:
        source = r if ids is None else tl.load(ids + r, mask=r < end, other=0)
        w = weight + e * expert_step + f * weight_f
        sums = tile_product(
            rows + source * row_step, w, r < end, f < F, row_d, weight_d, D, ROWS, COLUMNS, DEPTH, PRECISE, WIDEN
        )
        if scale is not None:
            sums *= tl.load(scale + r, mask=r < end, other=0.0).to(tl.float32)[:, None]
        at = out + r[:, None] * F + f[None, :]
        tl.store(at, sums.to(out.dtype.element_ty), mask=(r < end)[:, None] & (f < F)[None, :])


@triton.jit
@no_type_check
def number(n, INTERPRETED: tl.constexpr):
    """The interpreter's range takes a plain number, the compiler's what was loaded; a `while` is not pipelined."""
    if INTERPRETED:
        return n.handle.data.item()
    else:
        return n


@triton.jit
@no_type_check
def _weight_grad(
    grad, grad_ids, rows, row_ids, counts, ends, out, grad_step, grad_f, row_step, row_d,
    F: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # ROWS and COLUMNS of the expert's matrix; DEPTH of the expert's rows at a time.
    wide: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    high: tl.constexpr = (F + ROWS - 1) // ROWS
    program = tl.program_id(0).to(tl.int64)
    expert, f0, d0 = program // (wide * high), program // wide % high, program % wide
    f = f0 * ROWS + tl.arange(0, ROWS)
    d = d0 * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ends + expert)
    first = end - tl.load(counts + expert)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(number(first, WIDEN), number(end, WIDEN), DEPTH):
        r = start + tl.arange(0, DEPTH).to(tl.int64)
        g_row = r if grad_ids is None else tl.load(grad_ids + r, mask=r < end, other=0)
        x_row = r if row_ids is None else tl.load(row_ids + r, mask=r < end, other=0)
        g_at = grad + g_row[None, :] * grad_step + f[:, None] * grad_f
        g = tl.load(g_at, mask=(r < end)[None, :] & (f < F)[:, None], other=0.0)
        x_at = rows + x_row[:, None] * row_step + d[None, :] * row_d
        x = tl.load(x_at, mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
        if WIDEN:
            g, x = g.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(g, x, sums, input_precision=PRECISE)
    at = out + expert * F * D + f[:, None] * D + d[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(f < F)[:, None] & (d < D)[None, :])


def product(
    rows: Tensor, weight: Tensor, tiles: Tiles, out: Tensor, ids: Tensor | None = None, scale: Tensor | None = None
) -> None:
    """out_r = scale_r weight[e(r)] row, row number r or ids_r; rows of no expert are not written."""
    _, F, D = weight.shape
    shape = tiling(tiles.rows, F, D, rows.dtype)
    grid = (tiles.num * -(-F // shape.columns),)
    operands = rows, ids, weight, scale, out, tiles.table, tiles.num, *rows.stride(), *weight.stride()
    settings: Any = (F, D, *shape.blocks, precision(), INTERPRETED)
    if grid[0]:
        _product[grid](*operands, *settings, **shape.launch)


def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A program takes a block of one expert's rows and of columns."""
    # Rows of no expert stay 0.
    out = room(rows, len(rows), weight.shape[1]).zero_()
    product(rows, weight, lay(counts, len(rows), rows.dtype), out)
    return out.to(rows.dtype)


def weight_grad(
    grad: Tensor, rows: Tensor, counts: Tensor, grad_ids: Tensor | None = None, row_ids: Tensor | None = None
) -> Tensor:
    """A program takes a tile of one expert's matrix and sums over its rows in order; row r is row ids_r where there are
    ids."""
    E, F, D = len(counts), grad.shape[1], rows.shape[1]
    num_rows = len(grad if grad_ids is None else grad_ids)
    # The sum over the rows is the depth of these products, an expert's matrix their rows and columns.
    shape = tiling(rows_of_a_tile(F, 1, rows.dtype), D, -(-num_rows // max(1, E)), rows.dtype)
    out, counts = room(rows, E, F, D), counts.long().contiguous()
    grid = (E * -(-F // shape.rows) * -(-D // shape.columns),)
    operands = grad, grad_ids, rows, row_ids, counts, counts.cumsum(0), out, *grad.stride(), *rows.stride()
    settings: Any = (F, D, *shape.blocks, precision(), INTERPRETED)
    if grid[0]:
        _weight_grad[grid](*operands, *settings, **shape.launch)
    return out.to(rows.dtype)
