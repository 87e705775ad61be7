"""Integrated Mixture-of-Depths-and-Experts: no-op experts beside the real ones, in one router."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.dense import Activation
from sparsemix.layers.dispatch import dispatch, experts_cost, num_seats
from sparsemix.layers.expert_choice import choice_stats, take
from sparsemix.layers.linear import Experts
from sparsemix.layers.router import Route, Router, load_of, picks_of, route, z_loss
from sparsemix.layers.ternary import FLOAT, PrecisionConfig
from sparsemix.layers.threshold import RunningThreshold


class MoDEConfig(LayerConfig):
    """y = sum of gate_e expert_e(x) over a token's real experts; a no-op expert adds 0 and costs nothing.

    Token choice: every token picks top_k of the num_experts + num_noop columns. Expert choice: every column picks
    tokens, top_k a token on average. balance_weight null: 0.01 for token choice, none for expert choice."""

    kind: Literal["mode"] = "mode"
    num_experts: int = Field(ge=1)
    num_noop: int = Field(ge=1)
    top_k: int = Field(ge=1)
    d_ff: int = Field(ge=1)
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    normalize_gates: bool = False
    balance_weight: float | None = Field(default=None, ge=0)
    z_weight: float = Field(default=0.0, ge=0)
    activation: Activation = "swiglu"
    precision: PrecisionConfig = FLOAT

    @model_validator(mode="after")
    def _fits(self) -> "MoDEConfig":
        self.rule(self.top_k <= self.columns, "top_k", f"must lie in [1, num_experts + num_noop={self.columns}]")
        if self.routing == "expert_choice":
            way_out = "works with routing=token_choice only; leave it out"
            self.rule(not self.normalize_gates, "normalize_gates", way_out)
            self.rule(self.balance_weight is None, "balance_weight", way_out)
        return self

    @property
    def columns(self) -> int:
        return self.num_experts + self.num_noop

    @property
    def share(self) -> float:
        """Share of a row's tokens that one column takes under expert choice; and its target under token choice."""
        return self.top_k / self.columns

    @property
    def balance(self) -> float:
        default = 0.01 if self.routing == "token_choice" else 0.0
        return default if self.balance_weight is None else self.balance_weight

    @property
    def looks_ahead(self) -> bool:
        return self.routing == "expert_choice" and self.share < 1

    def cost(self, d_model: int, seq_len: int) -> Cost:
        """Exact for expert choice. For token choice at the balance loss's target, where num_experts of all columns'
        picks are real; stats["extra_flops"] holds what routing really spent beyond that."""
        E, seats = self.num_experts, self.share * seq_len
        rows = E * (seats if self.routing == "token_choice" else num_seats(self.share, seq_len))
        router = Cost.of("router", 2.0 * d_model * self.columns * seq_len, d_model * self.columns)
        return router + experts_cost(self.activation, d_model, self.d_ff, E, rows, self.share * E, self.precision)

    def build(self, d_model: int) -> "MoDE":
        return MoDE(self, d_model)


class MoDE(Layer):
    """Router rows num_experts.. are the no-ops, whose output is 0: on a residual branch that leaves the stream alone.

    Gates are a softmax over all columns, and if normalize_gates over all picks, no-ops included. The paper
    (arXiv:2404.02258, its MoDE) gives no equation, no counts and no loss. Chosen here: real and no-op columns are
    balanced apart (`separate_balance`), so that evenness among experts cannot be bought with no-ops; under expert
    choice what a no-op column takes adds nothing, so its picks are not computed: it works through the softmax
    and through its part of the capacity. A causal Ctx uses a running threshold per real expert."""

    def __init__(self, config: MoDEConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, config.columns)
        self.experts = Experts(config.num_experts, d_model, config.d_ff, config.activation, config.precision)
        self.threshold = RunningThreshold(config.num_experts) if config.looks_ahead else None

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        logits = self.router(x)
        valid = None if ctx.valid is None else ctx.valid.flatten()
        r = route(logits.flatten(0, 1), self.config.top_k, self.config.normalize_gates)
        choose = self.token_choice if self.config.routing == "token_choice" else self.expert_choice
        y, stats = choose(x, r, ctx)
        losses = {}
        if self.config.balance:
            losses["balance"] = self.config.balance * separate_balance(r, self.config.num_experts, valid)
        if self.config.z_weight:
            losses["router_z"] = self.config.z_weight * z_loss(r, valid)
        return y, Aux(losses, stats, {"router": r.logits} if ctx.logits else {})

    def token_choice(
        self, x: Float[Tensor, "B T D"], r: Route, ctx: Ctx
    ) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor]]:
        B, T, D = x.shape
        E, K = self.config.num_experts, self.config.top_k
        expert_ids = r.expert_ids.clamp(max=E)  # every no-op is id E
        if ctx.valid is not None:
            expert_ids = torch.where(ctx.valid.reshape(-1, 1), expert_ids, E)
        y = dispatch(x.flatten(0, 1), expert_ids, r.gates, self.experts, E).view_as(x)
        chosen = torch.zeros_like(r.probs, dtype=torch.bool).scatter(1, r.expert_ids, True)[:, :E].view(B, T, E)
        gates = torch.zeros_like(r.probs).scatter(1, r.expert_ids, r.gates.detach())[:, :E].view(B, T, E)
        if ctx.valid is not None:
            chosen = chosen & ctx.valid[..., None]
        stats = choice_stats(chosen, gates, ctx.valid, self.training)
        if ctx.picks:
            stats |= picks_of(chosen, gates)
        picks = chosen.sum(dim=(0, 1)).double()  # (E,)
        if self.training:
            tokens = stats["taken"].sum()
            stats["max_load"] = picks.max() / picks.sum().clamp_min(1)
            stats["noop_share"] = (tokens * K - picks.sum()) / (tokens * K).clamp_min(1)
            extra = picks.sum() - B * T * self.config.share * E
            stats["extra_flops"] = extra * experts_cost(self.config.activation, D, self.config.d_ff, E, 1, 0).flops
        return y, stats

    def expert_choice(
        self, x: Float[Tensor, "B T D"], r: Route, ctx: Ctx
    ) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor]]:
        B, T, _ = x.shape
        affinity = r.probs[:, : self.config.num_experts].unflatten(0, (B, T))
        y, chosen = take(x, affinity, ctx.valid, self.experts, self.config.share, self.threshold, ctx.causal)
        stats = choice_stats(chosen, affinity, ctx.valid, self.training)
        if ctx.picks:
            stats |= picks_of(chosen, affinity)
        if self.training:
            stats["noop_share"] = stats["taken"][0] / stats["taken"].sum().clamp_min(1)
            if self.threshold is not None:
                seen = self.threshold.observe(affinity, ctx.valid, self.config.share)
                stats |= Aux({}, seen).under("threshold").stats
        return y, stats


def separate_balance(r: Route, num_experts: int, valid: Bool[Tensor, " N"] | None) -> Float[Tensor, ""]:
    """within + between: within = E sum_e f_e P_e over the E real experts, f and P renormalised among them;
    between = f_real P_real / t_real + f_noop P_noop / t_noop, with target shares t of real and no-op columns by
    their number. Each is 1 at its target; f counts all picks, P is the mean probability.

    Not in the paper; the form is that of arXiv:2101.03961, eq. 4, with targets."""
    E, columns = num_experts, r.probs.shape[1]
    f = load_of(r.expert_ids, columns, valid)
    f = (f / f.sum().clamp_min(1)).to(r.probs.dtype)
    probs = r.probs if valid is None else torch.where(valid[:, None], r.probs, 0.0)
    P = probs.sum(0) / (max(1, probs.shape[0]) if valid is None else valid.sum().clamp_min(1))
    real, noop = f[:E].sum() * P[:E].sum(), f[E:].sum() * P[E:].sum()
    # Without a real pick there is nothing to even out, and both are 0.
    within = E * (f[:E] * P[:E]).sum() / real.clamp_min(torch.finfo(P.dtype).tiny)
    return within + columns * (real / E + noop / (columns - E))
