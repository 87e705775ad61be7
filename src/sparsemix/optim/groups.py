"""Which parameters decay, which are clipped together, and which optimizer moves them: rules, not lists of names."""

from typing import Literal, NamedTuple

import torch
from torch import nn

from sparsemix.layers.base import Layer
from sparsemix.layers.linear import Experts, Linear
from sparsemix.layers.norm import RMSNorm
from sparsemix.layers.peer import PEER
from sparsemix.layers.pkm import PKM
from sparsemix.layers.query_norm import QueryNorm
from sparsemix.optim.rates import ONE_RATE, Rates, trainable

Matrices = Literal["adamw", "muon"]
Moment = Literal["full", "row"]


def decays(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Weight decay reaches matrices only: not norms, biases, embeddings, product keys or their tables."""
    if isinstance(module, (nn.Embedding, RMSNorm, QueryNorm, PEER, PKM)):
        return False
    if name == "sub_norm":  # an expert bank's norms, stacked
        return False
    return parameter.ndim >= 2


def clip_groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """The trunk's parameters, and the predictors' apart: a predictor must not change the trunk's clipping."""
    trunk: list[nn.Parameter] = []
    predictors: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (predictors if _of_predictor(name) else trunk).append(parameter)
    return [group for group in (trunk, predictors) if group]


class Split(NamedTuple):
    """The trainable parameters of a module, each once, by who moves them: rate -> parameters."""

    decayed: dict[float, list[nn.Parameter]]
    plain: dict[float, list[nn.Parameter]]
    matrices: dict[float, list[nn.Parameter]]
    tables: dict[float, list[nn.Parameter]]


def split(module: nn.Module, matrices: Matrices, rates: Rates = ONE_RATE) -> Split:
    """`tables` are those whose gradients are recorded as factors; `matrices` are for Muon, none unless it is wished."""
    found = Split({}, {}, {}, {})
    seen: set[int] = set()
    for parameter, owner, name, path, role in trainable(module):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if isinstance(owner, Layer) and name in owner.tables and records(owner):
            mover = found.tables
        elif not decays(owner, name, parameter):
            mover = found.plain
        elif matrices == "muon" and is_hidden_matrix(owner, path, parameter):
            mover = found.matrices
        else:
            mover = found.decayed
        mover.setdefault(rates.of(role), []).append(parameter)
    return found


def records(layer: Layer) -> bool:
    """Can the gradients of this layer's tables leave as factors? Not where a table is sharded (a DTensor): there they
    are dense, as for any other optimizer."""
    return all(type(getattr(layer, name)) is nn.Parameter for name in layer.tables)


def is_hidden_matrix(owner: nn.Module, path: str, parameter: torch.Tensor) -> bool:
    """Weights of linear maps and of expert banks; not routers, predictors or a matrix of one row or column."""
    return isinstance(owner, (Linear, Experts)) and not _of_predictor(path) and min(parameter.shape[-2:]) > 1


def _of_predictor(path: str) -> bool:
    return "predictor" in path.split(".")
