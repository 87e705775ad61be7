"""AdamW on a table's rows on a GPU: one program sums a row's picks and updates the row."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsemix.ops.row_adam import Moments, Rates
from sparsemix.ops.row_grad import Order
from sparsemix.ops.row_grad.triton import PIECE, block_of, factors, row_gradient


@triton.jit
@no_type_check
def _update(
    w_ptr, m_ptr, v_ptr, keep_ptr, seen_ptr, place_ptr, row_ptr, start_ptr, pick_ptr, coef_ptr, vec_ptr, first_ptr,
    sum_ptr, R, D, rate, beta1, beta2, root, eps, keep, ALL: tl.constexpr, SKIP: tl.constexpr, BY_ROW: tl.constexpr,
    DECAYS: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    g = tl.zeros([BLOCK], dtype=tl.float32)
    moves = True
    if ALL:
        r = k
        u = tl.load(place_ptr + k)
        if u >= 0:
            g = row_gradient(u, start_ptr, pick_ptr, coef_ptr, vec_ptr, first_ptr, sum_ptr, R, D, cols, PIECE, BLOCK)
        if SKIP:
            moves = tl.load(seen_ptr + k) != 0
    else:
        r = tl.load(row_ptr + k)
        g = row_gradient(k, start_ptr, pick_ptr, coef_ptr, vec_ptr, first_ptr, sum_ptr, R, D, cols, PIECE, BLOCK)
        if DECAYS:
            keep = tl.load(keep_ptr + k)
    if moves:
        at = r * D + cols
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        m += (g - m) * (1 - beta1)
        tl.store(m_ptr + at, m, mask=mask)
        if BY_ROW:
            mean = tl.load(v_ptr + r) * beta2 + tl.sum(g * g) / D * (1 - beta2)
            tl.store(v_ptr + r, mean)
            step = m / (tl.sqrt(mean) * root + eps)
        else:
            v = tl.load(v_ptr + at, mask=mask, other=0.0) * beta2 + g * g * (1 - beta2)
            tl.store(v_ptr + at, v, mask=mask)
            step = m / (tl.sqrt(v) * root + eps)
        w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(w_ptr + at, w * keep - rate * step, mask=mask)


def some_rows_(
    table: Tensor,
    moments: Moments,
    order: Order,
    coef: Tensor,
    vec: Tensor,
    rates: Rates,
    decayed: Tensor | None,
    decay: float,
) -> None:
    keep = None if decayed is None else (decay - decayed[order.rows]).exp().float()
    if decayed is not None:
        decayed.index_fill_(0, order.rows, decay)
    _launch(len(order.rows), table, moments, order, coef, vec, rates, keep_by_row=keep)


def all_rows_(
    table: Tensor,
    moments: Moments,
    order: Order,
    coef: Tensor,
    vec: Tensor,
    rates: Rates,
    keep: float,
    seen: Tensor | None,
) -> None:
    place = torch.full((table.shape[0],), -1, dtype=torch.long, device=table.device)
    place[order.rows] = torch.arange(len(order.rows), dtype=torch.long, device=table.device)
    _launch(table.shape[0], table, moments, order, coef, vec, rates, keep=keep, seen=seen, place=place)


def _launch(
    programs: int,
    table: Tensor,
    moments: Moments,
    order: Order,
    coef: Tensor,
    vec: Tensor,
    rates: Rates,
    keep: float = 1.0,
    keep_by_row: Tensor | None = None,
    seen: Tensor | None = None,
    place: Tensor | None = None,
) -> None:
    if not programs:
        return
    args, pieces = factors(order, coef, vec)
    block, warps = block_of(table.shape[1])
    # A kernel that does not read an operand is given any tensor.
    unread = (table if x is None else x for x in (keep_by_row, seen, place))
    numbers = (rates.rate, *rates.betas, rates.root, rates.eps, float(keep))
    flags = (place is not None, seen is not None, moments.by_row, keep_by_row is not None)
    operands = (table, *moments, *unread, order.rows, *args, *pieces, coef.shape[1], table.shape[1])
    _update[(programs,)](*operands, *numbers, *flags, PIECE, block, num_warps=warps)  # pyright: ignore[reportCallIssue]
