"""Multi-head mixture of experts: split every token into sub-tokens, route each on its own, merge."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sparsemix.config import ConfigError
from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.dense import Activation, DenseConfig
from sparsemix.layers.linear import Linear
from sparsemix.layers.norm import RMSNorm
from sparsemix.layers.ternary import FLOAT, PrecisionConfig


class MHMoEConfig(LayerConfig):
    """y = merge(inner(split(head(x)))), `inner` at width d_model / num_heads; plus an always-on feed-forward on whole
    tokens if shared_d_ff > 0. `precision` is that of head, merge (with the norm before it) and that feed-forward; the
    inner layer has its own. Without `head` the token itself is split, without `merge` nothing mixes the heads again:
    for ablations."""

    kind: Literal["mh_moe"] = "mh_moe"
    num_heads: int = Field(ge=1)
    inner: LayerConfig
    shared_d_ff: int = Field(default=0, ge=0)
    bias: bool = False
    inner_residual: bool = False
    head: bool = True
    merge: bool = True
    precision: PrecisionConfig = FLOAT

    @property
    def shared(self) -> DenseConfig | None:
        if not self.shared_d_ff:
            return None
        activation: Activation = getattr(self.inner, "activation", "swiglu")
        return DenseConfig(d_ff=self.shared_d_ff, activation=activation, precision=self.precision)

    def d_head(self, d_model: int) -> int:
        if d_model % self.num_heads:
            raise ConfigError(f"num_heads={self.num_heads} must divide d_model={d_model}; choose a divisor")
        return d_model // self.num_heads

    def cost(self, d_model: int, seq_len: int) -> Cost:
        count = self.head + self.merge
        projections = count * d_model * d_model
        others = (count * d_model if self.bias else 0) + (d_model if self.merge and self.precision.normed else 0)
        inner = self.inner.cost(self.d_head(d_model), seq_len * self.num_heads)
        # A token's sub-tokens may pick different experts: at most num_heads times one sub-token's share.
        share = min(1.0, self.num_heads * inner.active_params / max(1, inner.params))
        per_param = inner.bytes / inner.active_params if inner.active_params else 0.0
        touched = Cost(inner.items, inner.params, share * inner.params, per_param * share * inner.params)
        matrices = Cost.of("linear", 2.0 * projections * seq_len, projections, weight_bytes=self.precision.weight_bytes)
        shared = self.shared.cost(d_model, seq_len) if self.shared else Cost()
        return matrices + Cost.of("linear", 0.0, others) + touched + shared

    def build(self, d_model: int) -> "MHMoE":
        return MHMoE(self, d_model)


class MHMoE(Layer):
    """Sub-token j of token t is row t * num_heads + j; one router and one pool of experts serve all heads.

    Source: arXiv:2411.16205, eqs. 1-4. Its earlier form (arXiv:2404.15045, eq. 6) adds the sub-token to its expert
    output: `inner_residual`. Head and merge follow the earlier paper's initial gains, 1/sqrt(2) and 1. The shared
    expert sees whole tokens beside head and merge, with the activation of `inner`: the paper does not say, but only so
    has it the same size in every model of its table 2. Its table 5 leaves out head, merge or both. The norm before the
    merge goes with it."""

    roles = {"head": "merge", "merge": "merge"}  # noqa: RUF012

    def __init__(self, config: MHMoEConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        d_head = config.d_head(d_model)
        self.head = self.merge_norm = self.merge = None
        if config.head:
            self.head = Linear(d_model, d_model, config.bias, gain=2**-0.5, precision=config.precision)
        if config.merge:
            self.merge_norm = RMSNorm(d_model) if config.precision.normed else None
            self.merge = Linear(d_model, d_model, config.bias, precision=config.precision)
        self.inner = config.inner.build(d_head)
        self.shared = config.shared.build(d_model) if config.shared else None

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        B, T, D = x.shape
        h = self.config.num_heads
        parts = (x if self.head is None else self.head(x)).reshape(B, T * h, D // h)
        mixed, aux = self.inner(parts, ctx.split(h))
        if self.config.inner_residual:
            mixed = parts + mixed
        y = mixed.reshape(B, T, D)
        if self.merge_norm is not None:
            y = self.merge_norm(y)
        if self.merge is not None:
            y = self.merge(y)
        if self.shared is not None:
            y = y + self.shared(x, ctx)[0]
        return y, aux.under("inner")
