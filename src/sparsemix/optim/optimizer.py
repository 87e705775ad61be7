"""The optimizer: torch's AdamW for dense parameters, Muon for matrices on request, row-sparse AdamW for tables."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsemix.config import ConfigError, parse
from sparsemix.layers.base import Layer
from sparsemix.ops.row_grad.factored import FactoredGrad, take_picks
from sparsemix.optim import muon, tables
from sparsemix.optim.groups import Matrices, Moment, records, split
from sparsemix.optim.loan import borrow, give_back
from sparsemix.optim.rates import Rates


def build_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    table_moment: Moment = "full",
    catch_up: bool = False,
    matrices: Matrices = "adamw",
    table_decay: float = 0.0,
    rates: Rates | Mapping[str, float] | None = None,
) -> "Optimizer":
    """AdamW over all trainable parameters of `module`; matrices decay by `weight_decay`, tables by `table_decay`.

    Every role of parameters moves at its own multiple of `lr`, as `rates` say (optim/rates.py has roles and defaults;
    a mapping changes some): a group's `lr` holds it, `Optimizer.set_lr` sets all of them.

    Tables that layers look up rows of (PEER, PKM) are stepped lazily: a row without a gradient stays as it is, moments
    too, and makes up for its decay when it is next reached. `catch_up` steps every row, as the dense optimizer does:
    the same weights, at the price of a pass over the table a step. `table_moment="row"` keeps one second moment a row.
    `matrices="muon"` moves the weights of linear maps and expert banks by Muon. From here on the backward passes of
    those layers leave their tables' gradients as factors, until `release` or the optimizer's end; a copy of a layer has
    dense ones. torch's tools see them in `table.grad`; the optimizer's own `clip_grad_norm_` is the fast one. Under
    several ranks gradients are dense, for whoever averages them, and a step moves the rows that any rank picked.
    Raises ConfigError."""
    for name, value, known in (("table_moment", table_moment, Moment), ("matrices", matrices, Matrices)):
        if value not in get_args(known):
            raise ConfigError(f"{name}={value} is none of {', '.join(get_args(known))}")
    found = split(module, matrices, rates if isinstance(rates, Rates) else parse(Rates, dict(rates or {})))
    row = {"method": "rows", "by_row": table_moment == "row", "catch_up": catch_up}
    groups: list[dict[str, Any]] = [
        {"params": parameters, "rate": rate, "lr": lr * rate, **settings}
        for by_rate, settings in (
            (found.decayed or {1.0: []}, {"weight_decay": weight_decay}),
            (found.plain or {1.0: []}, {"weight_decay": 0.0}),
            (found.matrices, {"weight_decay": weight_decay, "method": "muon"}),
            (found.tables, {"weight_decay": table_decay, **row}),
        )
        for rate, parameters in by_rate.items()
    ]
    layers = [m for m in module.modules() if isinstance(m, Layer) and m.tables and records(m)]
    return Optimizer(groups, lr, betas, layers)


class Optimizer(torch.optim.Optimizer):
    """Steps each group by its `method`: adamw, muon or rows. Made by `build_optimizer`."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], layers: list[Layer]
    ) -> None:
        dense = [group for group in groups if "method" not in group]
        self._adamw = torch.optim.AdamW(dense, lr=lr, betas=betas, eps=1e-8, fused=True)
        super().__init__(groups, self._adamw.defaults | {"method": "adamw"})
        self._layers = layers
        borrow(layers, self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle holds its layers too, whose tables it takes the gradients of."""
        return super().__getstate__() | {"_layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        dense = [group for group in self.param_groups if group["method"] == "adamw"]
        self._adamw = torch.optim.AdamW([{"params": group["params"]} for group in dense], fused=True)
        self._adamw.defaults = {name: value for name, value in self.defaults.items() if name != "method"}
        borrow(self._layers, self)

    def set_lr(self, lr: float) -> None:
        """Give every group its multiple of `lr`."""
        for group in self.param_groups:
            group["lr"] = lr * group["rate"]

    def _tables(self) -> list[Tensor]:
        return [table for group in self.param_groups if group["method"] == "rows" for table in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        super().zero_grad(set_to_none)
        for table in self._tables():
            table.grad = None
            take_picks(table)

    @torch.no_grad()
    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """The norm of all gradients of `parameters`, those of tables too, which are then scaled to `max_norm` if it is
        larger: what torch.nn.utils.clip_grad_norm_ does, which with tables takes the other gradients one by one."""
        parameters = [p for p in parameters if p.grad is not None]
        sparse = [p.grad for p in parameters if isinstance(p.grad, FactoredGrad)]
        dense = [p for p in parameters if not isinstance(p.grad, FactoredGrad)]
        if not sparse:
            return nn.utils.clip_grad_norm_(dense, max_norm)
        norms = [grad.norm_of_all() for grad in sparse]
        norms.append(nn.utils.get_total_norm([p.grad for p in dense if p.grad is not None]).to(norms[0]))
        norm = torch.linalg.vector_norm(torch.stack(norms))
        nn.utils.clip_grads_with_norm_(dense, max_norm, norm)
        for grad in sparse:
            grad.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def is_finite(self, parameter: Tensor) -> bool:
        """Is its gradient, if it has one, finite?"""
        grad = parameter.grad
        parts = [x for part in grad.parts for x in part[1:]] if isinstance(grad, FactoredGrad) else [grad]
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
                for table, grad in tables.gather(group["params"]):
                    tables.step(group, table, grad, self.state[table])
                    table.grad = None
        return loss

    @torch.no_grad()
    def flush(self) -> None:
        """Bring every row of the tables to the weight decay that it still has to make up for, before weights are read
        that training will not reach again. Without `table_decay` there is nothing to do."""
        for table in self._tables():
            tables.flush(table, self.state.get(table, {}))

    def release(self) -> None:
        """Give the tables' gradients back to autograd, for another optimizer. Its end does so too."""
        self.zero_grad()
        give_back(self._layers, self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("rate", 1.0)  # of an earlier version, which had one rate for all
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
