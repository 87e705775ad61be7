"""AdamW on looked-up tables: the gradient comes as factors sorted by row, and is summed row by row, never stored."""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sparsemix.ops import native
from sparsemix.ops.impl import Kernels
from sparsemix.ops.row_adam import reference
from sparsemix.ops.row_grad import Order, RowGrad, summed, table_grad

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
    `decayed` (fp64) of what each row has had; its entries are brought to `decay`."""
    picked = KERNELS.pick(impl, table, refused=_refused(table, moments))
    if picked in ("reference", "torch"):
        rows = order.rows
        keep = 1.0 if decayed is None else (decay - decayed[rows]).exp().to(moments.first.dtype)[:, None]
        w, m, v = (tensor[rows] for tensor in (table, *moments))
        new = reference.adamw(w, m, v, summed(order, grad.coef, grad.vec), rates, keep)
        for tensor, part in zip((table, *moments), new, strict=True):
            tensor.index_copy_(0, rows, part.to(tensor.dtype))
        if decayed is not None:
            decayed.index_fill_(0, rows, decay)
    elif picked == "triton":
        from sparsemix.ops.row_adam import triton

        triton.some_rows_(table, moments, grad, order, rates, decayed, decay)
    else:
        R, D = grad.ids.shape[1], table.shape[1]
        sizes = (len(order.rows), R, D, int(moments.by_row))
        _call("some_rows", table, *moments, decayed, *_factors(grad, order), *sizes, *_numbers(rates), float(decay))


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
    picked = KERNELS.pick(impl, table, refused=_refused(table, moments))
    if picked == "native":
        sizes = (len(order.rows), *table.shape[:1], grad.ids.shape[1], table.shape[1], int(moments.by_row))
        _call("all_rows", table, *moments, seen, *_factors(grad, order), *sizes, *_numbers(rates), float(keep))
    elif picked == "triton":
        from sparsemix.ops.row_adam import triton

        triton.all_rows_(table, moments, grad, order, rates, keep, seen)
    else:
        # Without a kernel the gradient is formed.
        exact = moments.first.dtype
        dense = table_grad(grad.coef.to(exact), grad.ids, grad.vec.to(exact), table.shape[0], picked)
        for tensor, new in zip((table, *moments), reference.adamw(table, *moments, dense, rates, keep), strict=True):
            tensor.copy_(new)


def _refused(table: Tensor, moments: Moments) -> str | None:
    if moments.first.dtype != torch.float32 or moments.second.dtype != torch.float32:
        return "the kernels keep moments in fp32"
    return None if table.is_contiguous() else "the table is not contiguous"


def _factors(grad: RowGrad, order: Order) -> tuple[Tensor, ...]:
    return (*order, grad.coef.float().contiguous(), grad.vec.float().contiguous())


def _numbers(rates: Rates) -> tuple[float, ...]:
    return (rates.rate, *rates.betas, rates.root, rates.eps)


def _call(name: str, table: Tensor, *args: Tensor | int | float | None) -> None:
    KERNELS.call(native.typed(name, table), table, *args)
