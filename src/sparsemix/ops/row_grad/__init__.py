"""Gradients of tables whose rows were looked up: dense, or left as factors that an optimizer takes."""

from math import gcd
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._library.effects import EffectType
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import INTEGERS, check_ids, check_op, vouch
from sparsemix.ops.row_grad import reference

KERNELS = Kernels("row_grad", Path(__file__).with_name("native.c"), triton=True)


class RowGrad(NamedTuple):
    """G[m] = sum over picks (n, r) with ids_nr = m of coef_nr * vec_n, not formed."""

    ids: Int[Tensor, "N R"]
    coef: Float[Tensor, "N R"]
    vec: Float[Tensor, "N D"]


class Order(NamedTuple):
    """The picks of a RowGrad by row: row rows[u] has the picks picks[starts[u]:starts[u + 1]], counted over (N, R)."""

    rows: Int[Tensor, " U"]
    starts: Int[Tensor, " U+1"]
    picks: Int[Tensor, " P"]


@torch.library.custom_op("sparsemix::record_rows", mutates_args=())
def record_rows(table: Tensor, ids: Tensor, coef: Tensor, vec: Tensor) -> None:
    """Leave one look-up's share of the gradient of a lent table (factored.py) in its `grad`."""
    from sparsemix.ops.row_grad import factored

    lent = factored.lent_table(table)
    if lent is None:
        raise RuntimeError("the optimizer that takes a table's gradients is gone since the forward pass: run it again")
    place = factored.gradient_goes(lent)
    if place == "caller":
        raise RuntimeError("torch.autograd.grad of a table through a compiled block: call its optimizer's release()")
    if place == "grad":
        # Copies: a compiled backward pass reuses its buffers, and `vec` may be the caller's own input, which the next
        # micro-batch overwrites. They cost 1 % of the step that they are for.
        factored.leave(lent, RowGrad(ids.clone(), coef.clone(), vec.clone()))


@torch.library.custom_op("sparsemix::note_picks", mutates_args=())
def note_picks(table: Tensor, ids: Tensor) -> None:
    """Say which rows of a lent table have a gradient, where that is formed whole."""
    from sparsemix.ops.row_grad import factored

    lent = factored.lent_table(table)
    if lent is not None and factored.gradient_goes(lent) == "grad":
        factored.note_picks(lent, ids)


@record_rows.register_fake
def _(table: Tensor, ids: Tensor, coef: Tensor, vec: Tensor) -> None:
    return None


@note_picks.register_fake
def _(table: Tensor, ids: Tensor) -> None:
    return None


# Without an effect torch.compile deletes a call that returns nothing.
record_rows.register_effect(EffectType.ORDERED)
note_picks.register_effect(EffectType.ORDERED)


def rows_gradient(
    table: Float[Tensor, "M D"],
    ids: Int[Tensor, "N R"],
    coef: Float[Tensor, "N R"],
    vec: Float[Tensor, "N D"],
    record: bool,
    impl: str = "auto",
) -> Float[Tensor, "M D"] | None:
    """The table's gradient, dense; None where it was recorded instead.

    Recorded is what `record` asks for of a lent table (factored.py): not of a tensor that stands in for it, such as
    functional_call's, nor for a caller of torch.autograd.grad. Several ranks average dense gradients, and only note the
    rows that they picked."""
    from sparsemix.ops.row_grad import factored

    # Before 2.13 torch does not call the tracing of a backward pass compiling.
    if record and not (torch.compiler.is_compiling() or is_fake(table)):
        lent = factored.lent_table(table)
        record = lent is not None and factored.gradient_goes(lent) != "caller"
    if record and not factored.several_ranks():
        record_rows(table, ids, coef, vec)
        return None
    if record:
        note_picks(table, ids)
    return table_grad(coef, ids, vec, table.shape[0], impl)


def joined(records: list[RowGrad]) -> RowGrad:
    """The sum of several gradients of one table, as one."""
    if len(records) == 1:
        return records[0]
    # Look-ups of different widths R are cut to a width that divides all; a piece keeps its token's vector.
    R = gcd(*(record.ids.shape[1] for record in records))
    ids, coef = (torch.cat([record[i].reshape(-1, R) for record in records]) for i in (0, 1))
    vecs = [r.vec if r.ids.shape[1] == R else r.vec.repeat_interleave(r.ids.shape[1] // R, dim=0) for r in records]
    return RowGrad(ids, coef, torch.cat(vecs))


def sort_rows(ids: Int[Tensor, "N R"], num_rows: int, impl: str = "auto") -> Order:
    """The picks ordered by row, and by their place where rows are equal. Raises IndexError for an id of no row."""
    order = Order(*torch.ops.sparsemix.sort_rows(ids, num_rows, impl))
    for part, below in zip(order, (num_rows, ids.numel() + 1, ids.numel()), strict=True):
        vouch(part, below)
    return order


@torch.library.custom_op("sparsemix::sort_rows", mutates_args=())
def _sorted(ids: Tensor, num_rows: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    if ids.dtype not in INTEGERS:
        raise RuntimeError(f"sort_rows: ids must be integers, not {ids.dtype}; cast them with .long()")
    flat = ids.reshape(-1)
    picked = KERNELS.pick(impl, ids.new_empty(0, dtype=torch.float32))
    if picked != "native" or max(flat.numel(), num_rows) >= 2**32:
        check_ids("sort_rows: ids", flat, num_rows)
        by_row, picks = flat.long().sort(stable=True)
        rows, counts = by_row.unique_consecutive(return_counts=True)
        return rows, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), picks
    flat = flat.long().contiguous()
    rows, starts, picks = (flat.new_empty(flat.numel() + 1) for _ in range(3))
    found = flat.new_empty(1)
    KERNELS.call("sort_rows", flat, flat.numel(), num_rows, rows, starts, picks, found)
    U = int(found)
    if U < 0:
        check_ids("sort_rows: ids", flat, num_rows)
    return rows[:U], starts[: U + 1], picks[:-1]


def _dense(order: Order) -> Order:
    return Order(*(part.contiguous() for part in order))


@_sorted.register_fake
def _(ids: Tensor, num_rows: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    U = torch.library.get_ctx().new_dynamic_size()
    sizes = (U, U + 1, ids.numel())
    rows, starts, picks = (ids.new_empty(size, dtype=torch.long) for size in sizes)
    return rows, starts, picks


def row_norm(order: Order, coef: Float[Tensor, "N R"], vec: Float[Tensor, "N D"], impl: str = "auto") -> Tensor:
    """The Euclidean norm of the whole table's gradient, a scalar in at least fp32. Has no gradient."""
    return torch.ops.sparsemix.row_norm(*order, coef, vec, impl)


@torch.library.custom_op("sparsemix::row_norm", mutates_args=())
def _norm(rows: Tensor, starts: Tensor, picks: Tensor, coef: Tensor, vec: Tensor, impl: str) -> Tensor:
    check_op("row_norm", coef, vec, rows, starts, picks)
    order, picked = Order(rows, starts, picks), KERNELS.pick(impl, vec, coef)
    if picked == "native":
        out = torch.empty((), dtype=torch.float64)
        (N, R), D = coef.shape, vec.shape[1]
        flat = (coef.float().contiguous(), vec.float().contiguous())
        KERNELS.call("row_norm_sq", *_dense(order), *flat, len(rows), N, R, D, out)
        return out.sqrt().float()
    if picked == "triton":
        from sparsemix.ops.row_grad import triton

        return triton.row_norm(order, coef, vec)
    return torch.linalg.vector_norm(summed(order, coef, vec))


@_norm.register_fake
def _(rows: Tensor, starts: Tensor, picks: Tensor, coef: Tensor, vec: Tensor, impl: str) -> Tensor:
    return vec.new_empty((), dtype=torch.promote_types(vec.dtype, torch.float32))


def summed(order: Order, coef: Float[Tensor, "N R"], vec: Float[Tensor, "N D"]) -> Float[Tensor, "U D"]:
    """The gradients of the rows that have one, through torch, in at least fp32."""
    exact = torch.promote_types(vec.dtype, torch.float32)
    out = vec.new_zeros(len(order.rows), vec.shape[1], dtype=exact)
    place = torch.repeat_interleave(order.starts.diff())
    # 2^22 numbers at a time: the vectors of all picks, (P, D), may be larger than the table.
    for part in torch.arange(len(place), dtype=torch.long, device=vec.device).split(
        max(1, 2**22 // max(1, vec.shape[1]))
    ):
        picks = order.picks[part]
        out.index_add_(0, place[part], coef.reshape(-1)[picks, None].to(exact) * vec[picks // coef.shape[1]].to(exact))
    return out


@torch.library.custom_op("sparsemix::row_table_grad", mutates_args=())
def table_grad(coef: Tensor, ids: Tensor, vec: Tensor, num_rows: int, impl: str = "auto") -> Tensor:
    """G[m] = sum over picks (n, r) with ids_nr = m of coef_nr * vec_n, dense (num_rows, D)."""
    check_op("row_table_grad", coef, ids, vec)
    picked, ids = KERNELS.pick(impl, vec, coef), ids.long()
    if picked == "reference":
        return reference.table_grad(coef, ids, vec, num_rows)
    if picked == "native":
        order = sort_rows(ids, num_rows, picked)
        (R, D), out = (ids.shape[1], vec.shape[1]), vec.new_zeros(num_rows, vec.shape[1])
        name = "table_grad_bf16" if vec.dtype == torch.bfloat16 else "table_grad_float"
        flat = (coef.float().contiguous(), vec.float().contiguous())
        KERNELS.call(name, *_dense(order), *flat, len(order.rows), R, D, out)
        return out
    if picked == "triton":
        from sparsemix.ops.row_grad import triton

        return triton.table_grad(sort_rows(ids, num_rows, picked), coef, vec, num_rows)
    check_ids("row_table_grad: ids", ids, num_rows)
    N, R = ids.shape
    bag = torch.arange(N, dtype=torch.long, device=ids.device).repeat_interleave(R)
    weights = coef.reshape(-1).contiguous()
    empty = ids.new_empty(0)
    return torch.ops.aten._embedding_bag_dense_backward(
        vec.contiguous(), ids.reshape(-1), bag, empty, empty, num_rows, False, 0, weights
    )


@table_grad.register_fake
def _(coef: Tensor, ids: Tensor, vec: Tensor, num_rows: int, impl: str = "auto") -> Tensor:
    return vec.new_empty(num_rows, vec.shape[1])


@register_flop_formula(torch.ops.sparsemix.sort_rows)
def _sort_flops(*args, **kwargs) -> int:
    return 0


@register_flop_formula(torch.ops.sparsemix.row_norm)
def _norm_flops(rows_shape, starts_shape, picks_shape, coef_shape, vec_shape, *args, **kwargs) -> int:
    """The picks are summed as for the gradient; its square is no product of matrices."""
    return 2 * picks_shape[0] * vec_shape[1]


@register_flop_formula(torch.ops.sparsemix.row_table_grad)
def _table_grad_flops(coef_shape, ids_shape, vec_shape, *args, **kwargs) -> int:
    return 2 * ids_shape[0] * ids_shape[1] * vec_shape[1]
