"""The optimizer: torch's AdamW for dense parameters, Muon for matrices on request, row-sparse AdamW for tables."""

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsemix.config import ConfigError
from sparsemix.layers.base import Layer
from sparsemix.ops.row_grad import row_norm, take_rows
from sparsemix.optim import muon, tables
from sparsemix.optim.groups import Matrices, Moment, records, roles


def build_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    table_moment: Moment = "full",
    catch_up: bool = False,
    matrices: Matrices = "adamw",
    table_decay: float = 0.0,
) -> "Optimizer":
    """AdamW over all trainable parameters of `module`; matrices decay by `weight_decay`, tables by `table_decay`.

    Tables that layers look up rows of (PEER, PKM) are stepped lazily: a row without a gradient stays as it is, moments
    too, and makes up for its decay when it is next reached. `catch_up` steps every row, as the dense optimizer does:
    the same weights, at the price of a pass over the table a step. `table_moment="row"` keeps one second moment a row.
    `matrices="muon"` moves the weights of linear maps and expert banks by Muon. From here on the backward passes of
    those layers leave their tables' gradients to this optimizer, and `table.grad` stays None; `release` ends that.
    Clip with the optimizer's own `clip_grad_norm_`. Raises ConfigError."""
    for name, value, known in (("table_moment", table_moment, Moment), ("matrices", matrices, Matrices)):
        if value not in get_args(known):
            raise ConfigError(f"{name}={value} is none of {', '.join(get_args(known))}")
    decayed, plain, hidden, looked_up = roles(module, matrices)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if hidden:
        groups.append({"params": hidden, "weight_decay": weight_decay, "method": "muon"})
    if looked_up:
        row = {"method": "rows", "by_row": table_moment == "row", "catch_up": catch_up}
        groups.append({"params": looked_up, "weight_decay": table_decay, **row})
    layers = [layer for layer in module.modules() if isinstance(layer, Layer) and layer.tables]
    return Optimizer(groups, lr, betas, layers)


class Optimizer(torch.optim.Optimizer):
    """Steps each group by its `method`: adamw, muon or rows. Made by `build_optimizer`."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], layers: list[Layer]
    ) -> None:
        dense = [group for group in groups if "method" not in group]
        self._adamw = torch.optim.AdamW(dense, lr=lr, betas=betas, eps=1e-8, fused=True)
        super().__init__(groups, self._adamw.defaults | {"method": "adamw"})
        self._grads: dict[Tensor, tables.TableGrad] = {}
        self._layers = layers
        for layer in layers:
            layer.row_grads = records(layer)
        for table in self._tables():
            take_rows(table)  # left by a table that lay at the same address before

    def _tables(self) -> list[Tensor]:
        return [table for group in self.param_groups if group["method"] == "rows" for table in group["params"]]

    def _gathered(self, table: Tensor) -> tables.TableGrad | None:
        grad = tables.gather(table, self._grads.get(table))
        if grad is not None:
            self._grads[table] = grad
        return grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those recorded for tables too."""
        super().zero_grad(set_to_none)
        self._grads.clear()
        for table in self._tables():
            table.grad = None
            take_rows(table)

    @torch.no_grad()
    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """The norm of all gradients of `parameters`, those of tables too, which are then scaled to `max_norm` if it is
        larger: what torch.nn.utils.clip_grad_norm_ does with dense gradients."""
        parameters = list(parameters)
        ours = {id(table) for table in self._tables()}
        gathered = [self._gathered(p) for p in parameters if id(p) in ours]
        sparse = [grad for grad in gathered if grad is not None]
        dense = [p for p in parameters if p.grad is not None]
        if not sparse:
            return nn.utils.clip_grad_norm_(dense, max_norm)
        norms = [row_norm(grad.order, grad.factors.coef, grad.factors.vec) for grad in sparse]
        norms.append(nn.utils.get_total_norm([p.grad for p in dense if p.grad is not None]).to(norms[0]))
        norm = torch.linalg.vector_norm(torch.stack(norms))
        nn.utils.clip_grads_with_norm_(dense, max_norm, norm)
        for grad in sparse:
            grad.factors.coef.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def is_finite(self, parameter: Tensor) -> bool:
        """Is its gradient, as far as it was gathered, finite?"""
        grad = self._grads.get(parameter)
        parts = [parameter.grad] if grad is None else [grad.factors.coef, grad.factors.vec]
        return all(part is None or bool(part.isfinite().all()) for part in parts)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch's AdamW works on this optimizer's groups and state, which loading a checkpoint replaces.
        self._adamw.param_groups = [group for group in self.param_groups if group["method"] == "adamw"]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if group["method"] == "muon":
                muon.step(group, self.state)
            elif group["method"] == "rows":
                for table in group["params"]:
                    grad = self._gathered(table)
                    if grad is not None:
                        tables.step(group, table, grad, self.state[table])
        self._grads.clear()
        return loss

    @torch.no_grad()
    def flush(self) -> None:
        """Bring every row of the tables to the weight decay that it still has to make up for, before weights are read
        that training will not reach again. Without `table_decay` there is nothing to do."""
        for table in self._tables():
            tables.flush(table, self.state.get(table, {}))

    def release(self) -> None:
        """Give the tables' gradients back to autograd, for another optimizer."""
        self.zero_grad()
        for layer in self._layers:
            layer.row_grads = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._grads.clear()
        # torch casts every slot to its parameter's dtype; a table's are fp32, fp64 and bytes.
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        mine = (parameter for group in self.param_groups for parameter in group["params"])
        ours = {id(table) for table in self._tables()}
        for index, parameter in zip(saved, mine, strict=True):
            if id(parameter) in ours and index in state_dict["state"]:
                slots = state_dict["state"][index]
                self.state[parameter] = {
                    name: slot if slot.ndim == 0 else slot.to(parameter.device) for name, slot in slots.items()
                }
