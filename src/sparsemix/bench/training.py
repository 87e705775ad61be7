"""Forward, backward and optimizer steps of one layer or model, as contenders run them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsemix.api import build_optimizer
from sparsemix.bench.agreement import direction, movement, trained
from sparsemix.optim import Moment

Names = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def output_of(module: nn.Module, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """The first thing that the module returns: layers of ours and of some peers say more."""
    y = module(x)
    return y if isinstance(y, Tensor) else y[0]


@dataclass(frozen=True)
class Training:
    """A layer, its optimizer and an input; `named` gives its parameters' entries our names and layout."""

    layer: nn.Module
    x: Float[Tensor, "B T D"]
    optimizer: torch.optim.Optimizer | None = None
    named: Names = dict

    def forward(self) -> Tensor:
        with torch.no_grad():
            return output_of(self.layer, self.x)

    def backward(self) -> Tensor:
        """Forward and backward; what is left on the parameters is cleared first."""
        for parameter in self.layer.parameters():
            parameter.grad = None
        self.x.grad = None
        y = output_of(self.layer, self.x)
        y.backward(direction(y))
        return y

    def step(self) -> None:
        """Forward, backward and an optimizer step."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self.x.grad = None
        y = output_of(self.layer, self.x)
        y.backward(direction(y))
        self.optimizer.step()

    def probe(self) -> Mapping[str, Tensor]:
        """Output and all gradients, under our names."""
        y, parameters = self.backward(), trained(self.layer)
        # A fused backward may leave None for a table that no pick reached.
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        assert self.x.grad is not None
        named = {f"gradient of {name}": grad for name, grad in self.named(grads).items()}
        return {"output": y.detach(), "gradient of x": self.x.grad.clone(), **named}

    def moved(self) -> Mapping[str, Tensor]:
        """How far three optimizer steps move the parameters, under our names."""
        moves = movement(trained(self.layer), self.step)
        return self.named({name.removeprefix("movement of "): move for name, move in moves.items()})


def our_optimizer(
    module: nn.Module, lr: float = 1e-3, table_moment: Moment = "full", catch_up: bool = False
) -> torch.optim.Optimizer:
    """Our optimizer without decay, as the peers have none."""
    return build_optimizer(module, lr, weight_decay=0.0, table_moment=table_moment, catch_up=catch_up)


def twin_input(num_tokens: int, d_model: int, seed: int = 0) -> Float[Tensor, "1 T D"]:
    """The same input for every contender of a case."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, num_tokens, d_model, generator=generator).requires_grad_()
