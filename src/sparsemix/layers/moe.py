"""Mixture of experts with token choice: every token picks its top_k experts."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.dense import Activation, Dense, DenseConfig
from sparsemix.layers.dispatch import dispatch, experts_cost, first_come, num_seats, run_seats
from sparsemix.layers.linear import Experts
from sparsemix.layers.router import Route, Router, balance_loss, load_of, route, usage_stats, z_loss
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
    balance_picks: Literal["all", "first"] = "all"
    z_weight: float = Field(default=0.0, ge=0)
    bias_rate: float = Field(default=0.0, ge=0)
    capacity_factor: float | None = Field(default=None, gt=0)
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

    @property
    def share(self) -> float | None:
        """Seats of one expert per token of a row; None without a capacity."""
        return None if self.capacity_factor is None else self.capacity_factor * self.top_k / self.num_experts

    @property
    def looks_ahead(self) -> bool:
        # A later token's first choice is seated before an earlier token's second. With one choice the order is that
        # of positions, and with a seat for everybody nothing is dropped.
        return self.share is not None and self.share < 1 and self.top_k > 1

    def cost(self, d_model: int, seq_len: int) -> Cost:
        E, K = self.num_experts, self.top_k
        rows = K * seq_len if self.share is None else E * num_seats(self.share, seq_len)
        router = Cost.of("router", 2.0 * d_model * E * seq_len, d_model * E)
        experts = experts_cost(self.activation, d_model, self.d_ff, E, rows, K, self.precision)
        return router + experts + (self.shared.cost(d_model, seq_len) if self.shared else Cost())

    def build(self, d_model: int) -> "MoE":
        return MoE(self, d_model)


class MoE(Layer):
    """y_n = sum_k g_nk expert_k(x_n): softmax over all experts, the top_k largest, rows sorted by expert.

    With a capacity_factor an expert takes ceil(capacity_factor * top_k * n / num_experts) picks of a row with n real
    tokens, in the order of `first_come`; a dropped pick adds 0. A row is a group, so rows never compete. A causal Ctx
    drops nothing. With a bias_rate, b_e += bias_rate * sign(mean load - load_e) after every step, b starting at 0,
    where a dropped pick still counts as load.
    Sources: arXiv:2101.03961 (balance loss: its eq. 4), arXiv:2006.16668 (capacity), arXiv:2408.15664 (bias)."""

    bias: Tensor | None

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, config.num_experts)
        self.experts = Experts(config.num_experts, d_model, config.d_ff, config.activation, config.precision)
        self.shared = Dense(config.shared, d_model) if config.shared else None
        self.register_buffer("bias", torch.zeros(config.num_experts) if config.bias_rate else None)
        self.observes = ("load",) if config.bias_rate else ()

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        config, tokens = self.config, x.flatten(0, 1)  # (N, D)
        valid = None if ctx.valid is None else ctx.valid.flatten()
        r = route(self.router(tokens), config.top_k, config.normalize_gates, self.bias)
        stats = self.observe(r, valid)
        if ctx.picks:
            stats |= {"expert_ids": r.expert_ids, "gates": r.gates.detach()}
        if config.share is None or ctx.causal:
            y = dispatch(tokens, r.expert_ids, r.gates, self.experts, config.num_experts).view_as(x)
        else:
            y, stats["dropped"] = self.seat(x, r, ctx.valid, config.share)
        if self.shared is not None:
            y = y + self.shared(x, ctx)[0]
        losses = {}
        if config.balance_weight:
            losses["balance"] = config.balance_weight * balance_loss(r, valid, config.balance_picks, stats["counts"])
        if config.z_weight:
            losses["router_z"] = config.z_weight * z_loss(r, valid)
        return y, Aux(losses, stats, {"router": r.logits} if ctx.logits else {})

    def seat(
        self, x: Float[Tensor, "B T D"], r: Route, valid: Bool[Tensor, "B T"] | None, share: float
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, ""]]:
        """The update at a capacity, and the share of real tokens' picks that found no seat."""
        B, T, _ = x.shape
        K = self.config.top_k
        seats = first_come(r.expert_ids.view(B, T, K), valid, self.config.num_experts, share)
        asked = r.gates.view(B, T, K).transpose(1, 2).flatten(1)  # (B, K T)
        gates = asked.gather(1, seats.picks.flatten(1)).view_as(seats.picks)  # (B, E, C)
        y = run_seats(x, seats.picks % T, torch.where(seats.real, gates, 0.0), self.experts)
        asking = K * (torch.ones_like(r.gates[:, 0]) if valid is None else valid).sum().double()
        return y, (asking - seats.real.sum()) / asking.clamp_min(1)

    def observe(self, r: Route, valid: Bool[Tensor, " N"] | None) -> dict[str, Tensor]:
        """Picks per expert, dropped ones too; in training what the bias moves by."""
        if not self.training:
            return usage_stats(r.expert_ids, r.gates, self.config.num_experts, valid)
        counts = load_of(r.expert_ids, self.config.num_experts, valid)
        load = counts / counts.sum().clamp_min(1)
        stats = {"counts": counts, "max_load": load.max()}
        return stats if self.bias is None else stats | {"load": load}

    @torch.no_grad()
    def update(self, stats: Mapping[str, Tensor]) -> None:
        """Move the bias one step. It is no average of observations, so there is nothing to forget."""
        if self.bias is not None and "load" in stats:
            load = stats["load"].to(self.bias)
            self.bias += self.config.bias_rate * (load.mean() - load).sign()
