"""Mixture-of-Depths: only some tokens of a sequence pass through the wrapped layer."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig, valid_mean, valid_only
from sparsemix.layers.router import Router
from sparsemix.layers.threshold import RunningThreshold
from sparsemix.layers.token_selection import (
    Annealing,
    Predictor,
    agreement,
    first_tokens,
    quota,
    row_quota,
    strided,
    target_balance,
    top_tokens,
    uniform,
    wanted_first,
)
from sparsemix.ops.precision import at_least_fp32


class MoDConfig(LayerConfig):
    """y = gate * inner(x) for the tokens that the selector takes, `capacity` of each sequence, and 0 for the others."""

    kind: Literal["mod"] = "mod"
    inner: LayerConfig
    capacity: float = Field(default=0.125, gt=0)
    selector: Literal["expert_choice", "token_choice", "random", "strided"] = "expert_choice"
    gate: Literal["sigmoid", "raw", "two_sigmoid", "one"] = "sigmoid"
    block_output: Literal["delta", "full"] = "delta"
    sampling: Literal["predictor", "router_bce", "threshold"] = "predictor"
    predictor_width: int = Field(default=64, ge=1)
    router_loss_weight: float = Field(default=0.1, ge=0)
    anneal_steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "MoDConfig":
        whole = self.capacity == int(self.capacity)
        self.rule(self.capacity <= 1 or whole, "capacity", "must be a ratio in (0, 1] or a whole number of tokens")
        chooses = self.selector == "expert_choice"
        self.rule(
            chooses or self.capacity <= 1,
            "capacity",
            f"is a number of tokens, which selector={self.selector} cannot keep to while decoding; give a ratio",
        )
        self.rule(
            chooses or self.sampling == "predictor",
            "sampling",
            f"has no say: selector={self.selector} is causal by itself; leave sampling out",
        )
        self.rule(
            self.selector != "token_choice" or self.capacity < 1,
            "capacity",
            "leaves token_choice nothing to choose; give a ratio below 1",
        )
        return self

    @property
    def looks_ahead(self) -> bool:
        # The top-k over a sequence compares a token with later ones; the other selectors do not.
        return (self.selector == "expert_choice" and self.capacity != 1) or self.inner.looks_ahead

    @property
    def predicts(self) -> bool:
        """True if a predictor of the top-k is part of the layer."""
        return self.selector == "expert_choice" and self.sampling == "predictor"

    @property
    def has_threshold(self) -> bool:
        return self.selector == "expert_choice" and self.sampling == "threshold"

    def cost(self, d_model: int, seq_len: int) -> Cost:
        C = quota(self.capacity, seq_len)
        share = self.capacity if self.capacity <= 1 else C / seq_len
        total = Cost.of("router", 2.0 * d_model * seq_len, d_model) + self.inner.cost(d_model, C).routed(share)
        if self.predicts:
            w = self.predictor_width
            total += Cost.of("predictor", 2.0 * (d_model + 1) * w * seq_len, (d_model + 1) * w + w + 1)
        return total

    def build(self, d_model: int) -> "MoD":
        return MoD(self, d_model)


class MoD(Layer):
    """Source: arXiv:2404.02258, eq. 1. Router input is x itself; one router per layer.

    Selectors in training, each at most quota(T) tokens of a row (packed documents of a row share its quota):
    `expert_choice` the top-k of the scores, exactly the quota, ties to the earlier token; `random` the top-k of
    Gaussian noise (the paper's control); `token_choice` every token with a score above 0, the first ones if more want
    to than fit; `strided` every (1 / capacity)-th position. A causal Ctx asks expert_choice's `sampling` instead (a
    predictor trained on the detached input against the top-k; the score itself, trained by a cross-entropy; or a
    running threshold), hashes the position for `random`, and drops nobody for want of room. The gate always comes from
    the router.

    The paper leaves open whether its block output holds the residual: `delta` (default) gates the update alone, so a
    gate of 1 is the plain block; `full` gates x + update. Its equation gates with the raw score, its figures with a
    sigmoid (default). `anneal_steps` lowers the quota from all tokens by a cosine, in quarters."""

    salt: Tensor

    def __init__(self, config: MoDConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, 1)
        self.inner = config.inner.build(d_model)
        if config.predicts:
            self.predictor = Predictor(d_model, config.predictor_width)
        self.threshold = RunningThreshold(1) if config.has_threshold else None
        self.annealing = Annealing(config.anneal_steps) if config.anneal_steps else None
        if config.selector == "random":
            self.register_buffer("salt", torch.zeros((), dtype=torch.long))
        self.reset_parameters()

    @property
    def slack(self) -> float:
        """Share of the tokens beyond the capacity that pass as well, while it is annealed."""
        return 0.0 if self.annealing is None else self.annealing.slack

    def reset_parameters(self) -> None:
        if self.config.selector == "random":
            self.salt.random_(2**31)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        scores = self.router(x)[..., 0]  # (B, T)
        guess = self.predictor(x.detach()) if self.config.predicts else None
        keep = self.causal_rule(scores, guess, ctx) if ctx.causal else None
        said = Aux({}, {}, {"router": scores.reshape(-1, 1)} if ctx.logits else {})
        # Decoding, and a program for rows of any length, have no row to choose the best of, nor anything to learn.
        if keep is not None and (ctx.cache is not None or (torch.compiler.is_exporting() and not self.training)):
            y, inner = self.apply_rule(x, scores, keep, ctx)
            return y, said | Aux({}, self.seen(scores, guess, keep, ctx)) | inner
        ids, real = self.select(scores, ctx)
        chosen = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, chosen)  # (B, T)
        aux = self.observe(scores, guess, taken, taken if keep is None else keep, ctx)
        ran = self.apply_to(x, scores, ids, real, ctx) if keep is None else self.apply_rule(x, scores, keep, ctx)
        y, inner = ran
        return y, said | aux | inner

    def apply_rule(
        self, x: Float[Tensor, "B T D"], scores: Float[Tensor, "B T"], keep: Bool[Tensor, "B T"], ctx: Ctx
    ) -> tuple[Float[Tensor, "B T D"], Aux]:
        """The wrapped layer on the tokens to keep, zero elsewhere. Rows without any are left out, and where all tokens
        of the others pass, as in a step of decoding, nothing is gathered."""
        if torch.compiler.is_exporting():
            # One program for any number of passing tokens: all go in, the others as filling.
            ids = wanted_first(keep)
            return self.apply_to(x, scores, ids, keep.gather(1, ids), ctx)
        # The one reading of a tensor: how many pass decides what runs.
        counts = keep.sum(dim=1).tolist()
        passing = [b for b, count in enumerate(counts) if count]
        if not passing and not self.training:
            return torch.zeros_like(x), Aux()
        if not passing:
            # In training the wrapped layer must say what it observed: nothing, of filling.
            nobody = keep[:, :1]
            return self.apply_to(x, scores, nobody.long(), nobody, ctx)
        if len(passing) < len(counts):
            rows = torch.tensor(passing, dtype=torch.long, device=x.device)
            part, aux = self.apply_rule(x[rows], scores[rows], keep[rows], ctx.pick_rows(rows))
            return torch.zeros_like(x).index_copy(0, rows, part), aux
        if min(counts) == x.shape[1]:
            return self.gated(x, scores, None, ctx)
        ids = wanted_first(keep)[:, : max(counts)]
        return self.apply_to(x, scores, ids, keep.gather(1, ids), ctx)

    def apply_to(
        self,
        x: Float[Tensor, "B T D"],
        scores: Float[Tensor, "B T"],
        ids: Int[Tensor, "B C"],
        real: Bool[Tensor, "B C"] | None,
        ctx: Ctx,
    ) -> tuple[Float[Tensor, "B T D"], Aux]:
        """The wrapped layer on tokens `ids` of every row, written back to their places; zero elsewhere."""
        wide = ids[..., None].expand(-1, -1, x.shape[2])  # (B, C, D)
        y, aux = self.gated(x.gather(1, wide), scores.gather(1, ids), real, ctx.pick(ids, real))
        return y.new_zeros(x.shape).scatter(1, wide, y), aux

    def gated(
        self, x: Float[Tensor, "B C D"], scores: Float[Tensor, "B C"], real: Bool[Tensor, "B C"] | None, ctx: Ctx
    ) -> tuple[Float[Tensor, "B C D"], Aux]:
        """gate * inner(x) of tokens that all pass; 0 for filling."""
        out, aux = self.inner(x, ctx)
        out = out if self.config.block_output == "delta" else x + out
        gate = GATES[self.config.gate](scores)
        gate = gate if real is None else torch.where(real, gate, 0.0)
        return gate[..., None].to(x.dtype) * out, aux.under("inner")

    def select(self, scores: Float[Tensor, "B T"], ctx: Ctx) -> tuple[Int[Tensor, "B C"], Bool[Tensor, "B C"] | None]:
        """The selector of training: places of every row, in order, and which of them are taken (None: all).

        C = quota(T), and a row with n real tokens fills at most quota(n) of its C places."""
        capacity, T, valid = self.config.capacity, scores.shape[1], ctx.valid
        C = quota(capacity, T, self.slack)
        per_row = None if valid is None else row_quota(capacity, valid.sum(dim=1, keepdim=True), self.slack)
        if self.config.selector in ("token_choice", "strided"):
            return first_tokens(self.wants(scores, ctx), C, per_row)
        ranks = scores if self.config.selector == "expert_choice" else torch.randn_like(scores)
        return top_tokens(ranks, valid, C, per_row)

    def wants(self, scores: Float[Tensor, "B T"], ctx: Ctx) -> Bool[Tensor, "B T"]:
        """Real tokens that token_choice or strided would take, were there room for all."""
        if self.config.selector == "token_choice":
            wants = scores.detach() > 0
        else:
            wants = strided(ctx.places(scores.shape[1], scores.device), self.config.capacity).expand_as(scores)
        return wants if ctx.valid is None else wants & ctx.valid

    def causal_rule(
        self, scores: Float[Tensor, "B T"], guess: Float[Tensor, "B T"] | None, ctx: Ctx
    ) -> Bool[Tensor, "B T"]:
        """Real tokens that pass, each decided from itself and its position alone."""
        if self.config.selector in ("token_choice", "strided"):
            return self.wants(scores, ctx)
        if self.config.selector == "random":
            draws = uniform(ctx.places(scores.shape[1], scores.device), self.salt)
            keep = (draws < self.config.capacity).expand_as(scores)
        elif guess is not None:
            keep = guess > 0
        elif self.threshold is not None:
            keep = self.threshold(scores[..., None])[..., 0]
        else:
            keep = scores > 0
        return keep if ctx.valid is None else keep & ctx.valid

    def observe(
        self,
        scores: Float[Tensor, "B T"],
        guess: Float[Tensor, "B T"] | None,
        taken: Bool[Tensor, "B T"],
        keep: Bool[Tensor, "B T"],
        ctx: Ctx,
    ) -> Aux:
        """Losses of router and predictor, and what running state and reports need."""
        config, T, losses, stats = self.config, scores.shape[1], {}, {}
        if config.predicts or (config.selector == "expert_choice" and config.sampling == "router_bce"):
            logits = at_least_fp32(scores if guess is None else guess)
            error = F.binary_cross_entropy_with_logits(logits, taken.to(logits.dtype), reduction="none")
            name, weight = ("router_bce", config.router_loss_weight) if guess is None else ("predictor", 1.0)
            losses[name] = weight * valid_mean(error, ctx.valid)
            says, counts = logits.detach() > 0, torch.ones_like(taken) if ctx.valid is None else ctx.valid
            cells = [says & taken, says & ~taken, ~says & taken, ~says & ~taken]
            # True and false positives, then false and true negatives, against the top-k.
            stats["confusion"] = torch.stack([(cell & counts).sum() for cell in cells]).double()
            stats |= agreement(stats["confusion"]) if self.training else {}
        if config.selector == "token_choice":
            wants = self.wants(scores, ctx)
            losses["balance"] = config.router_loss_weight * target_balance(scores, wants, ctx.valid, config.capacity)
            if self.training:
                stats["dropped"] = (wants.sum() - taken.sum()) / wants.sum().clamp_min(1)
        if self.training and self.threshold is not None:
            share = quota(config.capacity, T, self.slack) / max(1, T)
            stats |= Aux({}, self.threshold.observe(scores[..., None], ctx.valid, share)).under("threshold").stats
        if self.training and self.slack:
            stats["extra_flops"] = scores.new_tensor(self.extra_flops(*scores.shape), dtype=torch.float64)
        if not self.training:
            stats |= self.seen(scores, guess, keep, ctx)
        return Aux(losses, stats)

    def seen(
        self, scores: Float[Tensor, "B T"], guess: Float[Tensor, "B T"] | None, keep: Bool[Tensor, "B T"], ctx: Ctx
    ) -> dict[str, Tensor]:
        """Statistics of every single token."""
        logits = {"scores": scores} if guess is None else {"scores": scores, "guess": guess}
        return {name: valid_only(value.detach(), ctx.valid) for name, value in logits.items()} | {"routed": keep}

    def extra_flops(self, B: int, T: int) -> float:
        """Forward FLOPs beyond the settings' cost while the capacity is still being lowered."""
        D, capacity = self.router.weight.shape[1], self.config.capacity
        now, at_last = (self.config.inner.cost(D, quota(capacity, T, slack)).flops for slack in (self.slack, 0.0))
        return B * (now - at_last)


GATES = {
    "sigmoid": torch.sigmoid,
    "raw": lambda score: score,
    "two_sigmoid": lambda score: 2 * torch.sigmoid(score),
    "one": torch.ones_like,
}
