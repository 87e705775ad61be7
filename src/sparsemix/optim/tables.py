"""AdamW on looked-up tables, whose gradients are factors: state, gathering, and one step."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparsemix.ops.native import huge_pages
from sparsemix.ops.row_adam import Moments, Rates, all_rows_, some_rows_
from sparsemix.ops.row_grad import Order, RowGrad
from sparsemix.ops.row_grad.factored import FactoredGrad, every_row, rows_with_gradient, several_ranks, take_picks


class TableGrad(NamedTuple):
    """A table's gradient as factors, and the order of its picks by row."""

    factors: RowGrad
    order: Order


def gather(tables: list[Tensor]) -> Iterator[tuple[Tensor, TableGrad]]:
    """Every table that has a gradient, and that. Under several ranks the rows that any of them picked have one: all
    ranks call this, with the same tables."""
    picked = picked_by_any(tables) if several_ranks() else [None] * len(tables)
    for table, rows in zip(tables, picked, strict=True):
        grad = table.grad
        if grad is None:
            continue
        if not isinstance(grad, FactoredGrad):
            grad = FactoredGrad(table, [every_row(grad) if rows is None else rows_with_gradient(grad, rows)])
        found = grad.gathered()
        if found is not None:
            yield table, TableGrad(*found)


def picked_by_any(tables: list[Tensor]) -> list[Tensor]:
    """Which rows of each table some rank picked since the last step, in one exchange."""
    if not tables:
        return []
    flat = torch.cat([take_picks(table) for table in tables]).to(torch.uint8)
    dist.all_reduce(flat, dist.ReduceOp.MAX)
    return list(flat.bool().split([len(table) for table in tables]))


def step(group: dict[str, Any], table: Tensor, grad: TableGrad, slots: dict[str, Tensor]) -> None:
    """One step of AdamW with the settings of `group`. `slots` are the table's state; empty before the first step."""
    if not slots:
        slots |= _new_slots(table, group["by_row"], group["catch_up"])
    slots["step"] += 1
    lr, weight_decay = float(group["lr"]), group["weight_decay"]
    if lr * weight_decay >= 1:
        raise ValueError(f"weight_decay={weight_decay} times lr={lr} must be less than 1 for tables")
    rates = Rates(lr, group["betas"], group["eps"], int(slots["step"]))
    moments = Moments(slots["exp_avg"], slots["exp_avg_sq"])
    if group["catch_up"]:
        slots["seen"].index_fill_(0, grad.order.rows, 1)
        all_rows_(table, moments, *grad, rates, 1 - lr * weight_decay, slots["seen"])
        return
    if weight_decay and "decayed" not in slots:
        # fp64: sums over a run's steps of what one step takes, of which differences are used.
        slots["decay"] = torch.zeros((), dtype=torch.float64)
        slots["decayed"] = torch.zeros(table.shape[0], dtype=torch.float64, device=table.device)
    if "decayed" in slots:
        slots["decay"] += math.log1p(-lr * weight_decay)
        some_rows_(table, moments, *grad, rates, slots["decayed"], float(slots["decay"]))
    else:
        some_rows_(table, moments, *grad, rates)


def flush(table: Tensor, slots: dict[str, Tensor]) -> None:
    """Bring every row to the weight decay of all steps up to now."""
    if "decayed" in slots:
        due = slots["decay"].to(table.device) - slots["decayed"]
        table.mul_(due.exp().to(table.dtype)[:, None])
        slots["decayed"].fill_(slots["decay"])


def _new_slots(table: Tensor, by_row: bool, catch_up: bool) -> dict[str, Tensor]:
    # bf16 has too few digits for a running mean.
    exact = torch.promote_types(table.dtype, torch.float32)
    shape = table.shape[:1] if by_row else table.shape
    slots = {"step": torch.zeros((), dtype=torch.float32)}
    for name, size in (("exp_avg", table.shape), ("exp_avg_sq", shape)):
        slots[name] = torch.empty(size, dtype=exact, device=table.device)
        # Before anything is written to it: its rows are visited at random, as the table's.
        huge_pages(slots[name])
        slots[name].zero_()
    if catch_up:
        slots["seen"] = torch.zeros(table.shape[0], dtype=torch.uint8, device=table.device)
    return slots
