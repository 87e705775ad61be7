"""Learning rates by a parameter's role: what a layer says its parameters do decides how fast they move."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from pydantic import Field
from torch import nn

from sparsemix.config import Config

Role = Literal["trunk", "embedding", "router", "query", "keys", "tables", "predictor", "experts", "merge", "ternary"]


class Rates(Config):
    """Times the learning rate, by role.

    embedding: of tokens and positions, and the head. query: the query network of product keys and its norm; keys: their
    sub-keys; tables: the rows that they look up. router: of experts and of Mixture-of-Depths; predictor: of the latter.
    experts: the stacks of a mixture; merge: head and merge of multi-head mixtures. ternary: every matrix that is
    quantised in training, whatever else it is. trunk: all the rest."""

    trunk: float = Field(default=1.0, gt=0)
    embedding: float = Field(default=1.0, gt=0)
    router: float = Field(default=1.0, gt=0)
    query: float = Field(default=1.0, gt=0)
    keys: float = Field(default=1.0, gt=0)
    tables: float = Field(default=1.0, gt=0)
    predictor: float = Field(default=1.0, gt=0)
    experts: float = Field(default=1.0, gt=0)
    merge: float = Field(default=1.0, gt=0)
    ternary: float = Field(default=1.0, gt=0)

    def of(self, role: Role) -> float:
        return getattr(self, role)


# One rate for every role, as before roles had rates.
ONE_RATE = Rates(**dict.fromkeys(Rates.model_fields, 1.0))


class Trainable(NamedTuple):
    """A parameter, the module that owns it, its name there, that module's path, and its role."""

    parameter: nn.Parameter
    owner: nn.Module
    name: str
    path: str
    role: Role


def trainable(module: nn.Module, path: str = "", role: Role = "trunk") -> Iterator[Trainable]:
    """The parameters of `module` that train, one that is used twice each time. A module's `roles` name those of its own
    parameters and of all that lies in a child; the innermost name holds."""
    if isinstance(module, nn.Embedding):
        role = "embedding"
    declared = getattr(module, "roles", {})
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            yield Trainable(parameter, module, name, path, declared.get(name, role))
    for name, child in module.named_children():
        yield from trainable(child, f"{path}.{name}" if path else name, declared.get(name, role))
