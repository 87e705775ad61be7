"""Mixture of experts with expert choice: every expert picks its tokens."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.dense import Activation, Dense, DenseConfig
from sparsemix.layers.dispatch import best_tokens, experts_cost, num_seats, run_picks, run_seats
from sparsemix.layers.linear import Experts
from sparsemix.layers.router import Router, picks_of, usage_stats
from sparsemix.layers.ternary import FLOAT, PrecisionConfig
from sparsemix.layers.threshold import RunningThreshold


class ExpertChoiceConfig(LayerConfig):
    """y = sum over the experts that took x of gate_e expert_e(x); each takes capacity_factor * T / num_experts tokens
    of a group, so capacity_factor is the mean number of experts a token. At capacity_factor >= num_experts every
    expert takes every token."""

    kind: Literal["expert_choice"] = "expert_choice"
    num_experts: int = Field(ge=1)
    capacity_factor: float = Field(default=2.0, gt=0)
    d_ff: int = Field(ge=1)
    group: Literal["sequence", "batch"] = "sequence"
    shared_d_ff: int = Field(default=0, ge=0)
    activation: Activation = "swiglu"
    precision: PrecisionConfig = FLOAT

    @model_validator(mode="after")
    def _chooses(self) -> "ExpertChoiceConfig":
        one = "must be at least 1 with num_experts=1, whose affinity is 1 for every token; mod routes to one"
        self.rule(self.num_experts > 1 or self.capacity_factor >= 1, "capacity_factor", one)
        return self

    @property
    def shared(self) -> DenseConfig | None:
        if not self.shared_d_ff:
            return None
        return DenseConfig(d_ff=self.shared_d_ff, activation=self.activation, precision=self.precision)

    @property
    def share(self) -> float:
        """Share of a group's tokens that one expert takes."""
        return min(1.0, self.capacity_factor / self.num_experts)

    @property
    def looks_ahead(self) -> bool:
        return self.share < 1

    def cost(self, d_model: int, seq_len: int) -> Cost:
        """Of one sequence that is its own group; in a `batch` group rounding up happens once, and
        stats["extra_flops"] holds the difference."""
        E = self.num_experts
        router = Cost.of("router", 2.0 * d_model * E * seq_len, d_model * E)
        rows = E * num_seats(self.share, seq_len)
        experts = experts_cost(self.activation, d_model, self.d_ff, E, rows, self.share * E, self.precision)
        return router + experts + (self.shared.cost(d_model, seq_len) if self.shared else Cost())

    def batch_extra(self, d_model: int, batch: int, seq_len: int) -> float:
        """FLOPs of `batch` sequences as one group, more than as a group each (so never positive)."""
        E, rows = self.num_experts, num_seats(self.share, batch * seq_len) - batch * num_seats(self.share, seq_len)
        return experts_cost(self.activation, d_model, self.d_ff, E, rows * E, 0).flops

    def build(self, d_model: int) -> "ExpertChoice":
        return ExpertChoice(self, d_model)


class ExpertChoice(Layer):
    """S = softmax over experts of x W^T; expert e takes the C = ceil(capacity_factor * T / num_experts) real tokens of
    its group with the largest S_te, ties to the earlier; y_t = sum over the experts that took t of S_te expert_e(x_t).

    The paper's group is the batch; the default here is the row, so that training rows do not depend on each other.
    A causal Ctx takes t where S_te exceeds a running threshold (`RunningThreshold`), and gates stay S. No balance loss:
    every expert gets its share by construction. Source: arXiv:2202.09368, section 3.2."""

    def __init__(self, config: ExpertChoiceConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, config.num_experts)
        self.experts = Experts(config.num_experts, d_model, config.d_ff, config.activation, config.precision)
        self.shared = Dense(config.shared, d_model) if config.shared else None
        self.threshold = RunningThreshold(config.num_experts) if config.looks_ahead else None

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        (B, T, D), E = x.shape, self.config.num_experts
        groups = (1, B * T) if self.config.group == "batch" else (B, T)
        grouped = x.reshape(*groups, D)
        valid = None if ctx.valid is None else ctx.valid.reshape(groups)
        logits = self.router(grouped)
        affinity = logits.softmax(dim=-1)
        y, chosen = take(grouped, affinity, valid, self.experts, self.config.share, self.threshold, ctx.causal)
        stats = choice_stats(chosen.view(B, T, E), affinity.view(B, T, E), ctx.valid, self.training)
        if ctx.picks:
            stats |= picks_of(chosen, affinity)
        if self.training and self.threshold is not None:
            seen = self.threshold.observe(affinity, valid, self.config.share)
            stats |= Aux({}, seen).under("threshold").stats
        if self.training and not ctx.causal and self.config.group == "batch":
            stats["extra_flops"] = x.new_tensor(self.config.batch_extra(D, B, T), dtype=torch.double)
        y = y.view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, ctx)[0]
        return y, Aux({}, stats, {"router": logits.flatten(0, 1)} if ctx.logits else {})


def take(
    x: Float[Tensor, "B T D"],
    affinity: Float[Tensor, "B T E"],
    valid: Bool[Tensor, "B T"] | None,
    experts: nn.Module,
    share: float,
    threshold: RunningThreshold | None,
    causal: bool,
) -> tuple[Float[Tensor, "B T D"], Bool[Tensor, "B T E"]]:
    """The update, and which expert took which token. Every row is a group; without a threshold the experts take all."""
    if causal and threshold is not None:
        chosen = threshold(affinity)
        chosen = chosen if valid is None else chosen & valid[..., None]
        flat = chosen.flatten(0, 1)  # (N, E)
        expert_ids, token_ids = flat.T.nonzero(as_tuple=True)  # sorted by expert, then by token
        gates = affinity.flatten(0, 1)[token_ids, expert_ids]
        return run_picks(x.flatten(0, 1), token_ids, gates, flat.sum(dim=0), experts).view_as(x), chosen
    token_ids, real = best_tokens(affinity, valid, share)  # (B, E, C)
    gates = torch.where(real, affinity.transpose(1, 2).gather(2, token_ids), 0.0)
    chosen = torch.zeros_like(affinity, dtype=torch.bool).transpose(1, 2).scatter(2, token_ids, real).transpose(1, 2)
    return run_seats(x, token_ids, gates, experts), chosen


def choice_stats(
    chosen: Bool[Tensor, "B T E"], gates: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"] | None, training: bool
) -> dict[str, Tensor]:
    """`taken` (E + 1,): how many real tokens exactly 0, 1, ... E experts took; in evaluation also usage by expert."""
    E = chosen.shape[2]
    weights = torch.ones_like(chosen[..., 0]) if valid is None else valid
    times = chosen.sum(dim=2).flatten()
    taken = torch.zeros(E + 1, dtype=torch.double, device=chosen.device)
    stats = {"taken": taken.index_add(0, times, weights.flatten().double())}
    if training:
        return stats
    # Usage takes one pick a row: how many experts took a token differs.
    expert_ids = torch.arange(E, dtype=torch.long, device=chosen.device).expand_as(chosen).reshape(-1, 1)
    stats |= usage_stats(expert_ids, gates.reshape(-1, 1), E, chosen.reshape(-1))
    return stats | {"top_gate": torch.where(chosen, gates.detach(), 0.0).amax(dim=2)}
