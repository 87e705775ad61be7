"""Plain matrix multiplies and expert banks: every one in the library goes through here."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemix.layers.ternary import FLOAT, PrecisionConfig, ternary_experts_mm, ternary_linear
from sparsemix.ops.expert_mlp import expert_mlp
from sparsemix.ops.grouped_mm import grouped_mm
from sparsemix.ops.precision import at_least_fp32
from sparsemix.ops.ternary_mm import experts_of

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}
# What the gate goes through.
GATED = {"swiglu": "silu", "geglu": "gelu"}
# Gated or not, the function that is applied.
ACTS = GATED | {name: name for name in ACTIVATIONS}


class Linear(nn.Linear):
    """y = x W^T (+ b). W ~ N(0, gain^2 / d_in), b = 0: at gain 1 unit-variance inputs give unit-variance outputs.

    torch's own kind, so that adapters and quantisers which look for one find it. With ternary precision x and W are
    quantised on the way (layers/ternary.py); W is what is trained, b stays."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        gain: float = 1.0,
        precision: PrecisionConfig = FLOAT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # torch's constructor draws the weight, which needs it.
        self.gain = gain
        super().__init__(in_features, out_features, bias, device, dtype)
        self.precision = precision
        self.warmup = precision.warmup()
        self.roles = {"weight": "ternary"} if precision.ternary else {}

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.gain * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        if not self.precision.ternary:
            return F.linear(input, self.weight, self.bias)
        y = ternary_linear(input, self.weight, self.warmup)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class ExactLinear(Linear):
    """The same in at least fp32, whatever autocast says, for scores that choose."""

    def forward(self, input: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else at_least_fp32(self.bias)
            return F.linear(at_least_fp32(input), at_least_fp32(self.weight), bias)


def num_matrices(activation: str) -> int:
    """Matrices of one feed-forward: gated ones have three, plain ones two."""
    return 3 if activation in GATED else 2


def act(up: Float[Tensor, "*B F"], gate: Float[Tensor, "*B F"] | None, activation: str) -> Float[Tensor, "*B F"]:
    """act(gate) * up for gated activations, act(up) for plain ones."""
    if gate is not None:
        return ACTIVATIONS[GATED[activation]](gate) * up
    return ACTIVATIONS[activation](up)


class Experts(nn.Module):
    """E feed-forwards in stacked tensors: rows sorted by expert go in, rows in the same order come out.

    Parameters: gated `gate_up` (E, 2F, D), gate first; plain `up` (E, F, D); `down` (E, D, F); with a norm before
    down `sub_norm` (E, F). With ternary precision every matrix of every expert has its own scale."""

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, activation: str, precision: PrecisionConfig = FLOAT
    ) -> None:
        super().__init__()
        self.activation = activation
        self.precision = precision
        if activation in GATED:
            self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model))
        else:
            self.up = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.sub_norm = nn.Parameter(torch.empty(num_experts, d_ff)) if precision.normed else None
        self.warmup = precision.warmup()
        self.roles = dict.fromkeys(("gate_up", "up", "down"), "ternary" if precision.ternary else "experts")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.first, self.down):
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
        if self.sub_norm is not None:
            nn.init.ones_(self.sub_norm)

    @property
    def first(self) -> Tensor:
        """The weight that the rows meet first."""
        return self.gate_up if self.activation in GATED else self.up

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "R D"]:
        def first(rows: Tensor) -> Tensor:
            return self._multiply(rows, self.first, counts, num_matrices(self.activation) - 1)

        def down(hidden: Tensor) -> Tensor:
            return self._multiply(hidden, self.down, counts, 1)

        return feed_experts(rows, counts, first, down, self.activation, self.sub_norm)

    @property
    def plain(self) -> bool:
        """Is every expert no more than two products and an activation?"""
        return not self.precision.ternary and self.sub_norm is None

    def mix(
        self,
        tokens: Float[Tensor, "N D"],
        token_ids: Int[Tensor, " R"],
        gates: Float[Tensor, " R"],
        counts: Int[Tensor, " E"],
    ) -> Float[Tensor, "N D"]:
        """y_n = sum over the picks r with token_ids_r = n of gates_r expert_r(tokens_n), for `plain` experts; picks are
        sorted by expert."""
        return expert_mlp(tokens, token_ids, gates, counts, self.first, self.down, ACTS[self.activation])

    def _multiply(self, rows: Tensor, weight: Tensor, counts: Tensor, matrices: int) -> Tensor:
        if self.precision.ternary:
            return ternary_experts_mm(rows, weight, counts, matrices, self.warmup)
        return grouped_mm(rows, weight, counts)


def feed_experts(
    rows: Float[Tensor, "R D"],
    counts: Int[Tensor, " E"],
    first: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
    activation: str,
    sub_norm: Float[Tensor, "E F"] | None,
) -> Float[Tensor, "R D"]:
    """down(norm(act(gate) * up)) with (gate, up) = first(rows); without `sub_norm` no norm, plain ones no gate."""
    gate, up = first(rows).chunk(2, dim=-1) if activation in GATED else (None, first(rows))  # (R, F) each
    hidden = act(up, gate, activation)
    if sub_norm is not None:
        gain = sub_norm[experts_of(counts, rows.shape[0])]
        hidden = (F.rms_norm(hidden.to(gain.dtype), hidden.shape[-1:], eps=1e-6) * gain).to(hidden.dtype)
    return down(hidden)
