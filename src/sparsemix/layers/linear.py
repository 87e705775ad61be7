"""Plain matrix multiplies and expert banks: every one in the library goes through here."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemix.ops.grouped_mm import grouped_mm

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
GATED = {"swiglu": F.silu, "geglu": F.gelu}


class Linear(nn.Module):
    """y = x W^T (+ b). W ~ N(0, gain^2 / d_in), b = 0: at gain 1 unit-variance inputs give unit-variance outputs."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.gain * self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        return F.linear(x, self.weight, self.bias)


def num_matrices(activation: str) -> int:
    """Matrices of one feed-forward: gated ones have three, plain ones two."""
    return 3 if activation in GATED else 2


def act(up: Float[Tensor, "*B F"], gate: Float[Tensor, "*B F"] | None, activation: str) -> Float[Tensor, "*B F"]:
    """act(gate) * up for gated activations, act(up) for plain ones."""
    if gate is not None:
        return GATED[activation](gate) * up
    return ACTIVATIONS[activation](up)


class Experts(nn.Module):
    """E feed-forwards in stacked tensors: rows sorted by expert go in, rows in the same order come out.

    Parameters: gated `gate_up` (E, 2F, D), gate first; plain `up` (E, F, D); `down` (E, D, F)."""

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        if activation in GATED:
            self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model))
        else:
            self.up = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "R D"]:
        if self.activation in GATED:
            gate, up = grouped_mm(rows, self.gate_up, counts).chunk(2, dim=-1)  # (R, F) each
        else:
            gate, up = None, grouped_mm(rows, self.up, counts)  # (R, F)
        return grouped_mm(act(up, gate, self.activation), self.down, counts)
