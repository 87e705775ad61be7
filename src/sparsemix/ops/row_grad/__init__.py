"""Gradients of tables whose rows were looked up: dense, or left as factors that an optimizer takes."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._library.effects import EffectType
from torch.utils.flop_counter import register_flop_formula


class RowGrad(NamedTuple):
    """G[m] = sum over picks (n, r) with ids_nr = m of coef_nr * vec_n, not formed."""

    ids: Int[Tensor, "N R"]
    coef: Float[Tensor, "N R"]
    vec: Float[Tensor, "N D"]


# What backward passes left for the optimizer, by the address of the table. The one global that the design permits.
_records: dict[int, list[RowGrad]] = {}


def take_rows(table: Tensor) -> list[RowGrad]:
    """What was recorded for `table` since the last call, one entry a look-up, in the order of the backward passes."""
    return _records.pop(table.data_ptr(), [])


@torch.library.custom_op("sparsemix::record_rows", mutates_args=())
def record_rows(table: Tensor, ids: Tensor, coef: Tensor, vec: Tensor) -> None:
    """Leave one look-up's share of the table's gradient to whoever calls `take_rows`."""
    _records.setdefault(table.data_ptr(), []).append(RowGrad(ids.clone(), coef.clone(), vec.clone()))


@record_rows.register_fake
def _(table: Tensor, ids: Tensor, coef: Tensor, vec: Tensor) -> None:
    return None


# Without an effect torch.compile deletes a call that returns nothing.
record_rows.register_effect(EffectType.ORDERED)


def rows_gradient(
    table: Float[Tensor, "M D"],
    ids: Int[Tensor, "N R"],
    coef: Float[Tensor, "N R"],
    vec: Float[Tensor, "N D"],
    record: bool,
) -> Float[Tensor, "M D"] | None:
    """The table's gradient, dense; None where it was recorded instead."""
    if record:
        record_rows(table, ids, coef, vec)
        return None
    return table_grad(coef, ids, vec, table.shape[0])


@torch.library.custom_op("sparsemix::row_table_grad", mutates_args=())
def table_grad(coef: Tensor, ids: Tensor, vec: Tensor, num_rows: int) -> Tensor:
    """G[m] = sum over picks (n, r) with ids_nr = m of coef_nr * vec_n, dense (num_rows, D)."""
    N, R = ids.shape
    bag = torch.arange(N, device=ids.device).repeat_interleave(R)
    weights = coef.reshape(-1).contiguous()
    empty = ids.new_empty(0)
    return torch.ops.aten._embedding_bag_dense_backward(
        vec.contiguous(), ids.reshape(-1), bag, empty, empty, num_rows, False, 0, weights
    )


@table_grad.register_fake
def _(coef: Tensor, ids: Tensor, vec: Tensor, num_rows: int) -> Tensor:
    return vec.new_empty(num_rows, vec.shape[1])


@register_flop_formula(torch.ops.sparsemix.row_table_grad)
def _table_grad_flops(coef_shape, ids_shape, vec_shape, *args, **kwargs) -> int:
    return 2 * ids_shape[0] * ids_shape[1] * vec_shape[1]
