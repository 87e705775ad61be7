"""Mixture-of-Depths: only some tokens of a sequence pass through the wrapped layer."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig, ceil_share, valid_mean
from sparsemix.layers.linear import Linear
from sparsemix.layers.router import Router, at_least_fp32


class MoDConfig(LayerConfig):
    """y = gate * inner(x) for the `capacity` share of each sequence's tokens with the highest scores, 0 for others."""

    kind: Literal["mod"] = "mod"
    inner: LayerConfig
    capacity: float = Field(default=0.125, gt=0, le=1)
    gate: Literal["sigmoid", "raw", "two_sigmoid", "one"] = "sigmoid"
    block_output: Literal["delta", "full"] = "delta"
    sampling: Literal["predictor", "threshold"] = "predictor"
    predictor_width: int = Field(default=64, ge=1)

    @property
    def looks_ahead(self) -> bool:
        # The top-k over a sequence compares a token with later ones.
        return self.capacity < 1 or self.inner.looks_ahead

    def cost(self, d_model: int, seq_len: int) -> Cost:
        inner = self.inner.cost(d_model, ceil_share(self.capacity, seq_len)).routed(self.capacity)
        total = Cost.of("router", 2.0 * d_model * seq_len, d_model) + inner
        if self.sampling == "predictor":
            w = self.predictor_width
            total += Cost.of("predictor", 2.0 * (d_model + 1) * w * seq_len, (d_model + 1) * w + w + 1)
        return total

    def build(self, d_model: int) -> "MoD":
        return MoD(self, d_model)


class Predictor(Layer):
    """Logit that the router's top-k will take this token, from the token alone: down(silu(up x))."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.up = Linear(d_model, width, bias=True)
        self.down = Linear(width, 1, bias=True)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> Float[Tensor, "B T"]:  # type: ignore[override]
        return self.down(F.silu(self.up(x)))[..., 0]


class MoD(Layer):
    """Source: arXiv:2404.02258, eq. 1. Router input is x itself; one router per layer; top-k per sequence (packed
    documents of a row share its quota), exactly ceil(capacity * T) tokens, ties to the earlier one.

    The paper leaves open whether its block output holds the residual: `delta` (default) gates the update alone, so a
    gate of 1 is the plain block; `full` gates x + update. Its equation gates with the raw score, its figures with a
    sigmoid (default). A causal Ctx routes by the predictor (trained on the detached input against the top-k) or by a
    running threshold; the gate always comes from the router."""

    threshold: Tensor
    num_updates: Tensor

    def __init__(self, config: MoDConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, 1)
        self.inner = config.inner.build(d_model)
        if config.sampling == "predictor":
            self.predictor = Predictor(d_model, config.predictor_width)
        else:
            self.register_buffer("threshold", torch.zeros(()))
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        scores = self.router(x)[..., 0]  # (B, T)
        guess = self.predictor(x.detach()) if self.config.sampling == "predictor" else None
        ids, real = top_tokens(scores, ctx.valid, self.config.capacity)
        aux = self.observe(scores, guess, ids, real, ctx)
        if not ctx.causal:
            y, inner = self.apply_to(x, scores, ids, real, ctx)
            return y, aux | inner
        keep = self.causal_rule(scores, guess)
        keep = keep if ctx.valid is None else keep & ctx.valid
        aux.stats["routed"] = keep
        rows = keep.any(dim=1).nonzero()[:, 0]  # (b,)
        if not len(rows):
            return torch.zeros_like(x), aux
        kept = keep[rows]
        ids = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
        part, inner = self.apply_to(x[rows], scores[rows], ids, kept.gather(1, ids), ctx.pick_rows(rows))
        return torch.zeros_like(x).index_copy(0, rows, part), aux | inner

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
        picked = x.gather(1, wide)
        out, aux = self.inner(picked, ctx.pick(ids, real))
        out = out if self.config.block_output == "delta" else picked + out
        gate = GATES[self.config.gate](scores.gather(1, ids))
        gate = gate if real is None else torch.where(real, gate, 0.0)
        return torch.zeros_like(x).scatter(1, wide, gate[..., None].to(x.dtype) * out), aux.under("inner")

    def causal_rule(self, scores: Float[Tensor, "B T"], guess: Float[Tensor, "B T"] | None) -> Bool[Tensor, "B T"]:
        if guess is not None:
            return guess > 0
        if not self.num_updates:
            raise RuntimeError(
                "the routing threshold was never observed: train first (sparsemix.update(module, aux.stats) after "
                "every step), or set sampling to predictor"
            )
        return scores > self.threshold

    def observe(
        self,
        scores: Float[Tensor, "B T"],
        guess: Float[Tensor, "B T"] | None,
        ids: Int[Tensor, "B C"],
        real: Bool[Tensor, "B C"] | None,
        ctx: Ctx,
    ) -> Aux:
        """The predictor's loss, and what running state and reports need."""
        losses, stats = {}, {}
        chosen = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        target = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, chosen)
        if guess is not None:
            exact = at_least_fp32(guess)
            error = F.binary_cross_entropy_with_logits(exact, target.to(exact.dtype), reduction="none")
            losses["predictor"] = valid_mean(error, ctx.valid)
            says, counts = guess.detach() > 0, torch.ones_like(target) if ctx.valid is None else ctx.valid
            cells = [says & target, says & ~target, ~says & target, ~says & ~target]
            # True and false positives, then false and true negatives, against the top-k.
            stats["confusion"] = torch.stack([(cell & counts).sum() for cell in cells]).double()
        elif self.training:
            real_scores = scores.detach() if ctx.valid is None else scores.detach()[ctx.valid]
            stats["threshold"] = real_scores.flatten().quantile(1 - self.config.capacity)
        if not self.training:
            seen = {"scores": scores} if guess is None else {"scores": scores, "guess": guess}
            stats |= {
                name: (t if ctx.valid is None else t.masked_fill(~ctx.valid, 0)).detach() for name, t in seen.items()
            }
        return Aux(losses, stats)

    @torch.no_grad()
    def update(self, stats: Mapping[str, Tensor]) -> None:
        if "threshold" not in stats:
            return
        self.num_updates += 1
        # A plain average at first, then a running one over about 100 steps.
        self.threshold.lerp_(stats["threshold"].to(self.threshold), max(0.01, 1.0 / int(self.num_updates)))

    def forget(self) -> None:
        if self.config.sampling == "threshold":
            self.num_updates.zero_()


def top_tokens(
    scores: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None, capacity: float
) -> tuple[Int[Tensor, "B C"], Bool[Tensor, "B C"] | None]:
    """The best real tokens of every row, in order, ties to the earlier one; and which of them are real.

    C = ceil(capacity * T); a row with n real tokens fills ceil(capacity * n) of its C places."""
    C = ceil_share(capacity, scores.shape[1])
    ranked = scores.detach() if valid is None else scores.detach().masked_fill(~valid, -torch.inf)
    best = ranked.argsort(dim=1, descending=True, stable=True)[:, :C]
    ids, order = best.sort(dim=1)
    if valid is None:
        return ids, None
    quota = (valid.sum(dim=1, keepdim=True) * capacity - 1e-9).ceil()
    return ids, (order < quota) & valid.gather(1, ids)


GATES = {
    "sigmoid": torch.sigmoid,
    "raw": lambda score: score,
    "two_sigmoid": lambda score: 2 * torch.sigmoid(score),
    "one": torch.ones_like,
}
