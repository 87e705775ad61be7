"""Gradients of tables that an optimizer takes as factors: they lie in `table.grad`, where all of torch's tools see them
as the whole."""

import warnings
import weakref
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from sparsemix.ops import row_grad
from sparsemix.ops.row_grad import Order, RowGrad

aten = torch.ops.aten


class Lent:
    """Whose the gradients of a table are, and under several ranks which rows were picked."""

    def __init__(self, owner: object) -> None:
        self.owner = weakref.ref(owner)
        self.picked: Bool[Tensor, " M"] | None = None


# Tables by what they are, not by an address or an id that another may get. Neither tables nor owners are kept alive,
# and a copy of a table is not in it. The one global that the design permits.
_lent = WeakTensorKeyDictionary()


def lend(table: Tensor, owner: object) -> None:
    """From here on, as long as `owner` lives, look-ups of `table` that `record` leave their gradients as factors."""
    _lent[table] = Lent(owner)


def take_back(table: Tensor) -> None:
    """The end of `lend`."""
    _lent.pop(table, None)


def lent_table(table: Tensor) -> Tensor | None:
    """The lent table that this tensor is, or stands for in a recomputed block; None if there is none, or its owner is
    gone."""
    if table not in _lent and table.requires_grad and table.is_leaf:
        table = getattr(_accumulator(table), "variable", table)
    return table if table in _lent and _lent[table].owner() is not None else None


def _accumulator(leaf: Tensor) -> Any:
    """The node of autograd that adds to the leaf's `grad`, which a saved leaf shares with the original."""
    # An operation runs below autograd, where no tensor knows its node.
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing):
        return torch.autograd.graph.get_gradient_edge(leaf).node


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


Place = Literal["grad", "caller", "nowhere"]


def gradient_goes(table: Tensor) -> Place:
    """Where the backward pass under way puts the table's gradient: into its `grad`, to who called torch.autograd.grad,
    or nowhere, as it was asked for others only."""
    if torch._C._current_graph_task_id() == -1:
        return "grad"
    try:
        return "grad" if torch._C._will_engine_execute_node(_accumulator(table)) else "nowhere"
    except RuntimeError:
        # Its only one: the leaf's gradient is caught for a caller.
        return "caller"


def leave(table: Tensor, part: RowGrad) -> None:
    """Add factors to `table.grad`."""
    grad = table.grad
    if grad is None:
        grad = FactoredGrad(table, [])
    elif not isinstance(grad, FactoredGrad):
        grad = FactoredGrad(table, [every_row(grad)])
    grad.receive(part)
    table.grad = grad


def note_picks(table: Tensor, ids: Int[Tensor, "N R"]) -> None:
    """Remember which rows were picked, for `take_picks`."""
    lent = _lent[table]
    picked = lent.picked
    if picked is None:
        picked = lent.picked = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    picked[ids.flatten()] = True


def take_picks(table: Tensor) -> Bool[Tensor, " M"]:
    """The rows that were picked since the last call."""
    lent = _lent.get(table)
    if lent is None or lent.picked is None:
        return torch.zeros(len(table), dtype=torch.bool, device=table.device)
    picked, lent.picked = lent.picked, None
    return picked


def every_row(grad: Tensor) -> RowGrad:
    """A dense gradient as factors: every row is picked once."""
    return some_rows(grad, torch.arange(len(grad), device=grad.device))


def some_rows(grad: Tensor, rows: Int[Tensor, " U"]) -> RowGrad:
    """The rows of a dense gradient that count, as factors."""
    vec = grad if len(rows) == len(grad) else grad[rows]
    return RowGrad(rows[:, None], vec.new_ones(len(rows), 1), vec)


def rows_with_gradient(grad: Tensor, picked: Bool[Tensor, " M"]) -> RowGrad:
    """A dense gradient as factors: the rows that were picked, and those that something else gave a gradient."""
    return some_rows(grad, (picked | (grad != 0).any(dim=1)).nonzero()[:, 0])


class FactoredGrad(Tensor):
    """The sum of `parts`, a dense tensor to whoever reads it.

    Norms, scaling and adding, as clipping and accumulation do, work on the factors. Anything else forms the whole
    gradient first, and says so once: it takes as much memory as the table."""

    parts: list[RowGrad]
    order: Order | None

    # Results of functions are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, table: Tensor, parts: list[RowGrad]) -> "FactoredGrad":
        grad = Tensor._make_wrapper_subclass(cls, table.shape, dtype=table.dtype, device=table.device)  # type: ignore[attr-defined]
        grad.parts, grad.order = list(parts), None
        return grad

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"FactoredGrad({tuple(self.shape)}, {len(self.parts)} parts)"

    def receive(self, part: RowGrad) -> None:
        """Add to the sum."""
        self.parts.append(part)
        self.order = None

    def gathered(self) -> tuple[RowGrad, Order] | None:
        """The sum as one part, and its picks by row; None of an empty sum."""
        if not self.parts:
            return None
        if self.order is None:
            self.parts = [row_grad.joined(self.parts)]
            self.order = row_grad.sort_rows(self.parts[0].ids, len(self))
        return self.parts[0], self.order

    def picked(self) -> Bool[Tensor, " M"]:
        """The rows that have a part."""
        mask = torch.zeros(len(self), dtype=torch.bool, device=self.device)
        for part in self.parts:
            mask[part.ids.flatten().long()] = True
        return mask

    def norm_of_all(self) -> Tensor:
        found = self.gathered()
        if found is None:
            return torch.zeros((), device=self.device)
        (_, coef, vec), order = found
        return row_grad.row_norm(order, coef, vec)

    def scale(self, factor: Tensor | float) -> None:
        for part in self.parts:
            part.coef.mul_(factor)

    def whole(self) -> Tensor:
        """The dense gradient."""
        found = self.gathered()
        if found is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        ids, coef, vec = found[0]
        return row_grad.table_grad(coef, ids, vec, len(self)).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        grad, kwargs = args[0], kwargs or {}
        if isinstance(grad, FactoredGrad):
            if func is aten.linalg_vector_norm.default and len(args) <= 2 and args[1:] in ((), (2,), (2.0,)):
                return grad.norm_of_all().to(kwargs.get("dtype") or grad.dtype)
            if func in (aten.mul_.Tensor, aten.mul_.Scalar) and _is_number(args[1]):
                grad.scale(args[1])
                return grad
            if func is aten.detach.default:
                return _with(grad, grad.parts)
            if func is aten.clone.default:
                return _with(grad, [RowGrad(*(each.clone() for each in part)) for part in grad.parts])
            if func is aten.zero_.default:
                grad.parts, grad.order = [], None
                return grad
            if func in (aten.add.Tensor, aten.add_.Tensor) and not kwargs and args[1].shape == grad.shape:
                total = grad if func is aten.add_.Tensor else _with(grad, grad.parts)
                for part in args[1].parts if isinstance(args[1], FactoredGrad) else [every_row(args[1].clone())]:
                    total.receive(part)
                return total
        return _on_wholes(func, args, kwargs)


def _with(grad: FactoredGrad, parts: list[RowGrad]) -> FactoredGrad:
    return FactoredGrad(grad, parts)


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def _on_wholes(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on whole gradients; those that it writes to keep what was written."""
    grads = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FactoredGrad)]
    warnings.warn(
        f"{func} forms the whole gradient of a looked-up table, {tuple(grads[0].shape)}: its optimizer keeps it as "
        "factors. optimizer.clip_grad_norm_ works on them; optimizer.release() gives the tables to another optimizer",
        stacklevel=3,
    )
    wholes = {id(grad): grad.whole() for grad in grads}
    args, kwargs = tree_map(lambda leaf: wholes.get(id(leaf), leaf), (args, kwargs))
    result = func(*args, **kwargs)
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    written = {
        id(leaf)
        for argument in func._schema.arguments
        if argument.is_write
        for leaf in tree_leaves(given.get(argument.name))
    }
    back = {}
    for grad in grads:
        whole = wholes[id(grad)]
        if id(whole) in written:
            # Rows that nobody picked still have no gradient: a step must leave them as they are.
            grad.parts, grad.order, back[id(whole)] = [rows_with_gradient(whole, grad.picked())], None, grad
    return tree_map(lambda leaf: back.get(id(leaf), leaf), result)
