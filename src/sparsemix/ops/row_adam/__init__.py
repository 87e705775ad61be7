"""AdamW on looked-up tables: the gradient comes as factors sorted by row, and is summed row by row, never stored."""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops import native
from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.row_adam import reference
from sparsemix.ops.row_grad import Order, RowGrad, summed

KERNELS = Kernels("row_adam", Path(__file__).with_name("native.c"), triton=True)


class Moments(NamedTuple):
    """Running means of the gradient and of its square; (M,) for the second: one number a row, the row's mean."""

    first: Float[Tensor, "M D"]
    second: Float[Tensor, "M D"] | Float[Tensor, " M"]

    @property
    def by_row(self) -> bool:
        return self.second.ndim == 1


class Rates(NamedTuple):
    """What AdamW's equation needs in step `step`, counted from 1."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int

    @property
    def rate(self) -> float:
        """lr / (1 - beta1^t)."""
        return self.lr / (1 - self.betas[0] ** self.step)

    @property
    def root(self) -> float:
        """(1 - beta2^t)^-1/2."""
        return (1 - self.betas[1] ** self.step) ** -0.5


def some_rows_(
    table: Float[Tensor, "M D"],
    moments: Moments,
    grad: RowGrad,
    order: Order,
    rates: Rates,
    decayed: Float[Tensor, " M"] | None = None,
    decay: float = 0.0,
    impl: str = "auto",
) -> None:
    """AdamW (`reference.py`) on the rows that have a gradient, in place; the others stay as they are, moments too.

    Decoupled weight decay is made up for when a row is reached: `decay` is the logarithm of all decay up to now, and
    `decayed` (fp64) of what each row has had; its entries are brought to `decay`. Raises RuntimeError where autograd
    would have to see the step."""
    args = (table, *moments, decayed, *order, grad.coef, grad.vec, *_plain(rates), float(decay), impl)
    _refuse_autograd(table, *moments, grad.coef, grad.vec)
    torch.ops.sparsemix.row_adam_some(*args)


def all_rows_(
    table: Float[Tensor, "M D"],
    moments: Moments,
    grad: RowGrad,
    order: Order,
    rates: Rates,
    keep: float = 1.0,
    seen: UInt8[Tensor, " M"] | None = None,
    impl: str = "auto",
) -> None:
    """AdamW on every row, a row without picks having gradient zero: the dense optimizer, without a dense gradient.

    `keep` is the step's factor of weight decay. Where it is 1, rows not `seen` may be passed over: they never had a
    gradient, so their moments are zero and they stay where they are."""
    seen = seen if keep == 1.0 else None
    args = (table, *moments, seen, *order, grad.coef, grad.vec, *_plain(rates), float(keep), impl)
    _refuse_autograd(table, *moments, grad.coef, grad.vec)
    torch.ops.sparsemix.row_adam_all(*args)


@torch.library.custom_op("sparsemix::row_adam_some", mutates_args=("table", "first", "second", "decayed"))
def _some(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    decayed: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    picks: Tensor,
    coef: Tensor,
    vec: Tensor,
    lr: float,
    betas: list[float],
    eps: float,
    step: int,
    decay: float,
    impl: str,
) -> None:
    moments, order = Moments(first, second), Order(rows, starts, picks)
    rates = Rates(lr, (betas[0], betas[1]), eps, step)
    _check(table, moments, decayed, None, order, coef, vec)
    picked = KERNELS.pick(impl, table, refused=_refused(table, moments, decayed))
    if picked in ("reference", "torch"):
        keep = 1.0 if decayed is None else (decay - decayed[rows]).exp().to(first.dtype)[:, None]
        w, m, v = (tensor[rows] for tensor in (table, *moments))
        new = reference.adamw(w, m, v, summed(order, coef, vec), rates, keep)
        for tensor, part in zip((table, *moments), new, strict=True):
            tensor.index_copy_(0, rows, part.to(tensor.dtype))
        if decayed is not None:
            decayed.index_fill_(0, rows, decay)
    elif picked == "triton":
        from sparsemix.ops.row_adam import triton

        triton.some_rows_(table, moments, order, coef, vec, rates, decayed, decay)
    else:
        sizes = (len(rows), coef.shape[1], table.shape[1], int(moments.by_row))
        _call("some_rows", table, *moments, decayed, *_flat(order, coef, vec), *sizes, *_numbers(rates), decay)


@torch.library.custom_op("sparsemix::row_adam_all", mutates_args=("table", "first", "second"))
def _all(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    seen: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    picks: Tensor,
    coef: Tensor,
    vec: Tensor,
    lr: float,
    betas: list[float],
    eps: float,
    step: int,
    keep: float,
    impl: str,
) -> None:
    moments, order = Moments(first, second), Order(rows, starts, picks)
    rates = Rates(lr, (betas[0], betas[1]), eps, step)
    _check(table, moments, None, seen, order, coef, vec)
    picked = KERNELS.pick(impl, table, refused=_refused(table, moments, seen))
    if picked == "native":
        sizes = (len(rows), *table.shape[:1], coef.shape[1], table.shape[1], int(moments.by_row))
        _call("all_rows", table, *moments, seen, *_flat(order, coef, vec), *sizes, *_numbers(rates), keep)
    elif picked == "triton":
        from sparsemix.ops.row_adam import triton

        triton.all_rows_(table, moments, order, coef, vec, rates, keep, seen)
    else:
        # Without a kernel the gradient is formed.
        dense = torch.zeros_like(first).index_copy_(0, rows, summed(order, coef, vec).to(first.dtype))
        for tensor, new in zip((table, *moments), reference.adamw(table, *moments, dense, rates, keep), strict=True):
            tensor.copy_(new)


def _check(
    table: Tensor,
    moments: Moments,
    decayed: Tensor | None,
    seen: Tensor | None,
    order: Order,
    coef: Tensor,
    vec: Tensor,
) -> None:
    op = "row_adam_by_row" if moments.by_row else "row_adam"
    check_op(op, table, *moments, decayed, seen, coef, vec, *order)
    for name, state in (("table", table), ("first", moments.first), ("second", moments.second), ("decayed", decayed)):
        # Rows that share memory would be written twice.
        if state is not None and any(
            step == 0 < size - 1 for step, size in zip(state.stride(), state.shape, strict=True)
        ):
            raise RuntimeError(f"{op}: {name} is expanded, its rows share memory; .contiguous() gives each its own")


def _refused(table: Tensor, moments: Moments, by_row: Tensor | None) -> str | None:
    if moments.first.dtype != torch.float32 or moments.second.dtype != torch.float32:
        return "the kernels keep moments in fp32"
    whole = all(x.is_contiguous() for x in (table, *moments, by_row) if x is not None)
    return None if whole else "the table is not contiguous"


def _refuse_autograd(*operands: Tensor) -> None:
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        raise RuntimeError("a step of an optimizer has no gradient; take it under torch.no_grad()")


def _flat(order: Order, coef: Tensor, vec: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in (*order, coef.float(), vec.float()))


def _plain(rates: Rates) -> tuple[float, list[float], float, int]:
    """As an op's schema takes them."""
    return rates.lr, list(rates.betas), rates.eps, rates.step


def _numbers(rates: Rates) -> tuple[float, ...]:
    return (rates.rate, *rates.betas, rates.root, rates.eps)


def _call(name: str, table: Tensor, *args: Tensor | int | float | None) -> None:
    KERNELS.call(native.typed(name, table), table, *args)


@_some.register_fake
@_all.register_fake
def _(table: Tensor, *args: Tensor | float | list[float] | str | None) -> None:
    return None


@register_flop_formula([torch.ops.sparsemix.row_adam_some, torch.ops.sparsemix.row_adam_all])
def _flops(table_shape, first_shape, second_shape, _, rows_shape, starts_shape, picks_shape, *args, **kwargs) -> int:
    """Summing the picks, as for the dense gradient; the rest is element by element."""
    return 2 * picks_shape[0] * table_shape[1]
