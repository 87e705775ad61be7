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


class Roles(NamedTuple):
    """The trainable parameters of a module, each once, by who moves them."""

    decayed: list[nn.Parameter]
    plain: list[nn.Parameter]
    matrices: list[nn.Parameter]
    tables: list[nn.Parameter]


def roles(module: nn.Module, matrices: Matrices) -> Roles:
    """`tables` are those whose gradients are recorded as factors; `matrices` are for Muon, none unless it is wished."""
    found = Roles([], [], [], [])
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(owner, Layer) and name in owner.tables and records(owner):
                found.tables.append(parameter)
            elif not decays(owner, name, parameter):
                found.plain.append(parameter)
            elif matrices == "muon" and is_hidden_matrix(owner, path, parameter):
                found.matrices.append(parameter)
            else:
                found.decayed.append(parameter)
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
