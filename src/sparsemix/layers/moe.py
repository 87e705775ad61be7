"""Mixture of experts with token choice: every token picks its top_k experts; none is dropped."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.dense import Activation, Dense, DenseConfig
from sparsemix.layers.linear import Experts, num_matrices
from sparsemix.layers.router import Router, balance_loss, load_of, route, usage_stats, z_loss
from sparsemix.layers.ternary import FLOAT, PrecisionConfig


class MoEConfig(LayerConfig):
    """y = sum over the top_k experts of gate_e expert_e(x), plus an always-on shared expert if shared_d_ff > 0."""

    kind: Literal["moe"] = "moe"
    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    d_ff: int = Field(ge=1)
    shared_d_ff: int = Field(default=0, ge=0)
    normalize_gates: bool = False
    balance_weight: float = Field(default=0.01, ge=0)
    z_weight: float = Field(default=0.0, ge=0)
    activation: Activation = "swiglu"
    precision: PrecisionConfig = FLOAT

    @model_validator(mode="after")
    def _fits(self) -> "MoEConfig":
        self.rule(self.top_k <= self.num_experts, "top_k", f"must lie in [1, num_experts={self.num_experts}]")
        return self

    @property
    def shared(self) -> DenseConfig | None:
        if not self.shared_d_ff:
            return None
        return DenseConfig(d_ff=self.shared_d_ff, activation=self.activation, precision=self.precision)

    def cost(self, d_model: int, seq_len: int) -> Cost:
        router = Cost.of("router", 2.0 * d_model * self.num_experts * seq_len, d_model * self.num_experts)
        experts = experts_cost(
            self.num_experts, d_model, self.d_ff, self.activation, self.precision, self.top_k, self.top_k * seq_len
        )
        return router + experts + (self.shared.cost(d_model, seq_len) if self.shared else Cost())

    def build(self, d_model: int) -> "MoE":
        return MoE(self, d_model)


def experts_cost(
    num_experts: int, d_model: int, d_ff: int, activation: str, precision: PrecisionConfig, active: float, rows: float
) -> Cost:
    """Cost of an expert bank that runs `rows` rows a sequence; a token touches `active` experts."""
    expert, norm = num_matrices(activation) * d_model * d_ff, d_ff if precision.normed else 0
    matrices = Cost.of("experts", 2.0 * rows * expert, num_experts * expert, active * expert, precision.weight_bytes)
    return matrices + Cost.of("experts", 0.0, num_experts * norm, active * norm)


class MoE(Layer):
    """y_n = sum_k g_nk expert_k(x_n): softmax over all experts, the top_k largest, rows sorted by expert.
    Source: arXiv:2101.03961; the balance loss is its eq. 4 over all picks."""

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, config.num_experts)
        self.experts = Experts(config.num_experts, d_model, config.d_ff, config.activation, config.precision)
        self.shared = Dense(config.shared, d_model) if config.shared else None

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        config, tokens = self.config, x.flatten(0, 1)  # (N, D)
        valid = None if ctx.valid is None else ctx.valid.flatten()
        r = route(self.router(tokens), config.top_k, config.normalize_gates)
        y = dispatch(tokens, r.expert_ids, r.gates, self.experts, config.num_experts).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, ctx)[0]
        losses = {}
        if config.balance_weight:
            losses["balance"] = config.balance_weight * balance_loss(r, valid)
        if config.z_weight:
            losses["router_z"] = config.z_weight * z_loss(r, valid)
        stats = {} if self.training else usage_stats(r.expert_ids, r.gates, config.num_experts, valid)
        if self.training:
            load = load_of(r.expert_ids, config.num_experts, valid)
            stats["max_load"] = load.max() / load.sum().clamp_min(1)
        return y, Aux(losses, stats)


def dispatch(
    tokens: Float[Tensor, "N D"],
    expert_ids: Int[Tensor, "N K"],
    gates: Float[Tensor, "N K"],
    experts: nn.Module,
    num_experts: int,
) -> Float[Tensor, "N D"]:
    """y_n = sum_k gates_nk expert[expert_ids_nk](tokens_n), every expert run once over its sorted rows.

    `experts` maps (rows, counts) to rows: the bank of layers/linear.py, or its packed form."""
    N, K = expert_ids.shape
    order = expert_ids.reshape(-1).argsort(stable=True)  # (N K,) picks, sorted by expert
    counts = torch.bincount(expert_ids.reshape(-1), minlength=num_experts)
    rows = experts(tokens.index_select(0, order // K), counts)  # (N K, D)
    rows = rows * gates.reshape(-1)[order, None].to(rows.dtype)
    # A permutation and a sum over K: the same order of additions every time, unlike a scattered add.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=order.device))
    return rows.index_select(0, back).view(N, K, -1).sum(dim=1).to(tokens.dtype)
