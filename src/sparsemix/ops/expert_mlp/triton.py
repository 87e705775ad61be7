"""Experts on picked tokens on a GPU: the products read tokens where they lie and end in activations and gates.

Kernels call kernels, which the interpreter finds only if the tests' type checks leave them bare: `no_type_check`."""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsemix.ops.grouped_mm.triton import (
    INTERPRETED,
    Tiles,
    Tiling,
    lay,
    place,
    precision,
    product,
    room,
    tile_product,
    tiling,
    weight_grad,
)
from sparsemix.ops.triton_activations import activated, slope


@triton.jit
@no_type_check
def _first(
    tokens, ids, first, pre, hidden, table, num_tiles, token_step, token_d, expert_step, first_m, first_d,
    F: tl.constexpr, D: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """pre_r = first_e x_(ids_r), hidden_r = act(pre_r) or act(gate_r) up_r; pre is written where there is room."""
    e, r, end, f = place(table, num_tiles, F, ROWS, COLUMNS)
    if tl.min(r, axis=0) < end:
        M: tl.constexpr = 2 * F if GATED else F
        n = tl.load(ids + r, mask=r < end, other=0)
        x, w = tokens + n * token_step, first + e * expert_step + f * first_m
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        # tile_product, twice over one reading of the tokens.
        for start in range(0, D, DEPTH):
            d = start + tl.arange(0, DEPTH).to(tl.int64)
            left = tl.load(x[:, None] + d[None, :] * token_d, mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
            right_in = (f < F)[None, :] & (d < D)[:, None]
            right = tl.load(w[None, :] + d[:, None] * first_d, mask=right_in, other=0.0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            gate = tl.dot(left, right, gate, input_precision=PRECISE)
            if GATED:
                right = tl.load(w[None, :] + F * first_m + d[:, None] * first_d, mask=right_in, other=0.0)
                if WIDEN:
                    right = right.to(tl.float32)
                up = tl.dot(left, right, up, input_precision=PRECISE)
        inside = (r < end)[:, None] & (f < F)[None, :]
        if pre is not None:
            at = pre + r[:, None] * M + f[None, :]
            tl.store(at, gate.to(pre.dtype.element_ty), mask=inside)
            if GATED:
                tl.store(at + F, up.to(pre.dtype.element_ty), mask=inside)
        a = activated(gate, ACT)
        if GATED:
            a *= up
        tl.store(hidden + r[:, None] * F + f[None, :], a.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _slopes(
    dy, ids, down, gates, pre, d_pre, weighed, dots, table, num_tiles,
    dy_step, dy_d, expert_step, down_d, down_f,
    F: tl.constexpr, D: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """With s_r = down_e^T dy_(ids_r): dots_r = <s_r, hidden_r> over this program's columns (the gate's gradient is
    their sum), d_pre_r = gates_r s_r times the slopes of hidden_r in pre_r, weighed_r = gates_r hidden_r."""
    e, r, end, f = place(table, num_tiles, F, ROWS, COLUMNS)
    if tl.min(r, axis=0) < end:
        M: tl.constexpr = 2 * F if GATED else F
        wide: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
        n = tl.load(ids + r, mask=r < end, other=0)
        w = down + e * expert_step + f * down_f
        s = tile_product(dy + n * dy_step, w, r < end, f < F, dy_d, down_d, D, ROWS, COLUMNS, DEPTH, PRECISE, WIDEN)
        inside = (r < end)[:, None] & (f < F)[None, :]
        at = r[:, None] * M + f[None, :]
        z = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32)
        a, bend = activated(z, ACT), slope(z, ACT)
        scaled = s * tl.load(gates + r, mask=r < end, other=0.0).to(tl.float32)[:, None]
        low: tl.constexpr = d_pre.dtype.element_ty
        if GATED:
            up = tl.load(pre + at + F, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_pre + at + F, (scaled * a).to(low), mask=inside)
            a, bend = a * up, bend * up
        tl.store(d_pre + at, (scaled * bend).to(low), mask=inside)
        tl.store(dots + r * wide + tl.min(f, axis=0) // COLUMNS, tl.sum(s * a, axis=1), mask=r < end)
        a *= tl.load(gates + r, mask=r < end, other=0.0).to(tl.float32)[:, None]
        tl.store(weighed + r[:, None] * F + f[None, :], a.to(low), mask=inside)


@triton.jit
@no_type_check
def _combine(rows, order, starts, used, out, D, BLOCK: tl.constexpr):
    """out_n = sum of the rows of token n's picks, in the order of the picks; those from `used` on belong to no expert
    and were not written."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, last, num_rows = tl.load(starts + n), tl.load(starts + n + 1), tl.load(used)
    total = tl.zeros([BLOCK], tl.float32)
    while i < last:
        r = tl.load(order + i)
        # One comparison: the interpreter of Triton 3.9 takes no mask that was joined with a single number's.
        total += tl.load(rows + r * D + d, mask=d < tl.where(r < num_rows, D, 0), other=0.0).to(tl.float32)
        i += 1
    tl.store(out + n * D + d, total.to(out.dtype.element_ty), mask=d < D)


class ByToken(NamedTuple):
    """Picks sorted by token, stably: token n's are order[starts[n] : starts[n + 1]]; the first `used` have experts."""

    order: Tensor
    starts: Tensor
    used: Tensor


def by_token(token_ids: Tensor, counts: Tensor, num_tokens: int) -> ByToken:
    tokens, order = token_ids.sort(stable=True)
    starts = torch.searchsorted(tokens, torch.arange(num_tokens + 1, dtype=torch.long, device=tokens.device))
    return ByToken(order, starts, counts.sum())


def combine(rows: Tensor, picks: ByToken, like: Tensor) -> Tensor:
    (N, D), y = like.shape, room(like, *like.shape)
    if y.numel():
        block = min(triton.next_power_of_2(D), 1024)
        _combine[N, -(-D // block)](rows, *picks, y, D, block)
    return y.to(like.dtype)


def both(tiles: Tiles, down: Tensor) -> Tiling:
    """A program holds the products with gate and up, or d_hidden and the hidden rows."""
    return tiling(tiles.rows, down.shape[2], down.shape[1], down.dtype, held=2)


def _launch(kernel: Any, operands: tuple, tiles: Tiles, first: Tensor, down: Tensor, act: str) -> None:
    (_, D, F), shape = down.shape, both(tiles, down)
    grid = (tiles.num * -(-F // shape.columns),)
    if grid[0]:
        settings = F, D, first.shape[1] == 2 * F, act, *shape.blocks, precision(), INTERPRETED
        kernel[grid](*operands, *settings, **shape.launch)


def forward(
    tokens: Tensor, token_ids: Tensor, gates: Tensor, counts: Tensor, first: Tensor, down: Tensor, act: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """y (N, D), and pre (R, M) if `keep`."""
    R, (_, D, F), M, low = len(token_ids), down.shape, first.shape[1], tokens.dtype
    pre, hidden, rows = room(tokens, R if keep else 0, M), room(tokens, R, F), room(tokens, R, D)
    ids, tiles = token_ids.long().contiguous(), lay(counts, R, low)
    operands = tokens, ids, first, pre if keep else None, hidden, tiles.table, tiles.num
    _launch(_first, (*operands, *tokens.stride(), *first.stride()), tiles, first, down, act)
    product(hidden.to(low), down, tiles, rows, scale=gates.contiguous())
    return combine(rows.to(low), by_token(ids, counts, len(tokens)), tokens), pre.to(low)


def backward(
    dy: Tensor,
    pre: Tensor,
    tokens: Tensor,
    token_ids: Tensor,
    gates: Tensor,
    counts: Tensor,
    first: Tensor,
    down: Tensor,
    act: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of tokens, gates, first and down; empty ones where `needs` says no."""
    R, (_, D, F), M, low = len(token_ids), down.shape, first.shape[1], tokens.dtype
    ids, tiles = token_ids.long().contiguous(), lay(counts, R, low)
    d_pre, weighed = room(tokens, R, M), room(tokens, R, F)
    # Picks of no expert have no gradient.
    dots = torch.zeros(R, -(-F // both(tiles, down).columns), dtype=torch.float32, device=dy.device)
    operands = dy, ids, down, gates.contiguous(), pre, d_pre, weighed, dots, tiles.table, tiles.num
    _launch(_slopes, (*operands, *dy.stride(), *down.stride()), tiles, first, down, act)
    d_pre, weighed = d_pre.to(low), weighed.to(low)
    d_tokens, d_first, d_down = (dy.new_empty(0) for _ in range(3))
    if needs[0]:
        rows = room(tokens, R, D)
        product(d_pre, first.mT, tiles, rows)
        d_tokens = combine(rows.to(low), by_token(ids, counts, len(tokens)), tokens)
    if needs[1]:
        d_first = weight_grad(d_pre, tokens, counts, row_ids=ids)
    if needs[2]:
        d_down = weight_grad(dy, weighed, counts, grad_ids=ids)
    return d_tokens, dots.sum(1).to(gates.dtype), d_first, d_down
