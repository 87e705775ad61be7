"""The ordinary feed-forward layer: what every other kind replaces."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.linear import GATED, Linear, act, num_matrices
from sparsemix.layers.norm import RMSNorm
from sparsemix.layers.ternary import FLOAT, PrecisionConfig

Activation = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "silu"]


class DenseConfig(LayerConfig):
    """y = down(act(gate x) * up x); plain activations have no gate. With ternary precision down(norm(...)). `bias`
    adds one to every product."""

    kind: Literal["dense"] = "dense"
    d_ff: int = Field(ge=1)
    activation: Activation = "swiglu"
    bias: bool = False
    precision: PrecisionConfig = FLOAT

    def cost(self, d_model: int, seq_len: int) -> Cost:
        params = num_matrices(self.activation) * d_model * self.d_ff
        biases = (num_matrices(self.activation) - 1) * self.d_ff + d_model if self.bias else 0
        vectors = Cost.of("linear", 0.0, biases + (self.d_ff if self.precision.normed else 0))
        return vectors + Cost.of("linear", 2.0 * params * seq_len, params, weight_bytes=self.precision.weight_bytes)

    def build(self, d_model: int) -> "Dense":
        return Dense(self, d_model)


class Dense(Layer):
    """y = down(act(gate x) * up x). Source for SwiGLU: arXiv:2002.05202."""

    def __init__(self, config: DenseConfig, d_model: int) -> None:
        super().__init__()
        self.activation = config.activation
        if config.activation in GATED:
            self.gate = Linear(d_model, config.d_ff, config.bias, precision=config.precision)
        self.up = Linear(d_model, config.d_ff, config.bias, precision=config.precision)
        self.sub_norm = RMSNorm(config.d_ff) if config.precision.normed else None
        self.down = Linear(config.d_ff, d_model, config.bias, precision=config.precision)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        gate = self.gate(x) if self.activation in GATED else None
        hidden = act(self.up(x), gate, self.activation)
        return self.down(hidden if self.sub_norm is None else self.sub_norm(hidden)), Aux()
