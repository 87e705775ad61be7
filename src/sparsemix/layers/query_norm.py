"""Normalisation of product-key queries: batch statistics (the paper's), per-query LayerNorm, or none."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemix.layers.base import Layer, check_observed
from sparsemix.ops.precision import at_least_fp32

QueryNormKind = Literal["batch", "layer", "none"]


class QueryNorm(Layer):
    """Base: normalises queries (N, H, d_key); statistics to `update` with come back beside them."""

    def forward(  # type: ignore[override]
        self, query: Float[Tensor, "N H C"], valid: Bool[Tensor, " N"] | None, causal: bool = False
    ) -> tuple[Float[Tensor, "N H C"], dict[str, Tensor]]:
        return query, {}


class QueryBatchNorm(QueryNorm):
    """(q - mean) / std per head and channel, over all real tokens; then an affine map.

    Training uses the batch's own statistics (of this rank, if there are several), so it sees later tokens; evaluation,
    and training under a causal Ctx, uses running ones. forward only observes: `update` moves the running statistics,
    once per optimizer step. Source: arXiv:1907.05242, section 4. Evaluating before any observation raises
    RuntimeError."""

    observes = ("mean", "square")
    mean: Tensor
    variance: Tensor
    square: Tensor
    num_updates: Tensor

    def __init__(self, num_heads: int, d_key: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_heads, d_key))
        self.bias = nn.Parameter(torch.empty(num_heads, d_key))
        self.register_buffer("mean", torch.zeros(num_heads, d_key))
        self.register_buffer("variance", torch.ones(num_heads, d_key))
        # E[q^2], what earlier versions kept instead of the variance. Nothing is computed from it but that, when their
        # weights are read.
        self.register_buffer("square", torch.ones(num_heads, d_key))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, query: Float[Tensor, "N H C"], valid: Bool[Tensor, " N"] | None, causal: bool = False
    ) -> tuple[Float[Tensor, "N H C"], dict[str, Tensor]]:
        mean, variance, stats = self.mean.to(query.dtype), self.variance.to(query.dtype), {}
        if self.training:
            seen = moments(query, valid)
            stats = self.observe(seen[0].detach(), seen[1].detach(), valid) if len(query) else self.observed()
            mean, variance = (mean, variance) if causal else seen
        if causal or not self.training:
            instead = "set query_norm to layer or none"
            check_observed(self.num_updates, "query batch statistics", self.training, instead)
        scale = variance.add(self.eps).rsqrt()
        return (query - mean) * scale * self.weight + self.bias, stats

    def observe(
        self, mean: Float[Tensor, "H C"], variance: Float[Tensor, "H C"], valid: Bool[Tensor, " N"] | None
    ) -> dict[str, Tensor]:
        """What to `update` with: E[q] and E[q^2], whose means over micro-batches and ranks are those of all queries. In
        fp64, where their difference is a variance even at a mean of a million standard deviations."""
        # The same rounded mean in both, so that it cancels.
        mean = mean.double()
        seen = {"mean": mean, "square": variance.double() + mean.square()}
        if valid is None:
            return seen
        return {name: torch.where(valid.any(), seen[name], as_it_is) for name, as_it_is in self.observed().items()}

    def observed(self) -> dict[str, Tensor]:
        """An observation that changes nothing."""
        mean = self.mean.double()
        return {"mean": mean, "square": self.variance.double() + mean.square()}

    @torch.no_grad()
    def update(self, stats: Mapping[str, Tensor]) -> None:
        if "mean" not in stats:
            return
        self.num_updates += 1
        # A plain average at first, so that early steps do not lean on the initial values.
        step = max(self.momentum, 1.0 / int(self.num_updates))
        seen = stats["mean"].to(self.mean.device).double()
        variance = stats["square"].to(seen) - seen.square()
        before, away = self.mean.double(), seen - self.mean.double()
        # What the average of E[q^2] comes to: that of the variances, and the variance of the two means.
        spread = self.variance.double().lerp(variance, step) + step * (1 - step) * away.square()
        self.mean.copy_(before.lerp(seen, step))
        self.variance.copy_(spread.clamp_min(0))
        self.square.copy_(self.variance + self.mean.square())

    @torch.no_grad()
    def settle(self) -> None:
        """After buffers were written from outside: weights of earlier versions have no variance."""
        if not self.variance.any():
            self.variance.copy_((self.square - self.mean.square()).clamp_min(0))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # torch hands over a dictionary of its own, not the caller's.
        if prefix + "square" in state_dict and prefix + "variance" not in state_dict:
            square, mean = state_dict[prefix + "square"], state_dict[prefix + "mean"]
            state_dict[prefix + "variance"] = (square - mean.square()).clamp_min(0)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forget(self) -> None:
        self.num_updates.zero_()


def moments(
    query: Float[Tensor, "N H C"], valid: Bool[Tensor, " N"] | None
) -> tuple[Float[Tensor, "H C"], Float[Tensor, "H C"]]:
    """Mean and variance over real tokens, the second about the first; 0 of none."""
    share = torch.ones_like(query[:, 0, 0]) if valid is None else valid.to(query.dtype)
    share = (share / share.sum().clamp_min(1))[:, None, None]
    mean = (query * share).sum(0)
    return mean, ((query - mean).square() * share).sum(0)


class QueryLayerNorm(QueryNorm):
    """LayerNorm over each head's query; one affine map for all heads. Causal."""

    def __init__(self, d_key: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_key))
        self.bias = nn.Parameter(torch.zeros(d_key))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, query: Float[Tensor, "N H C"], valid: Bool[Tensor, " N"] | None, causal: bool = False
    ) -> tuple[Float[Tensor, "N H C"], dict[str, Tensor]]:
        weight, bias = at_least_fp32(self.weight), at_least_fp32(self.bias)
        return F.layer_norm(query, query.shape[-1:], weight, bias, self.eps), {}


def build_query_norm(kind: QueryNormKind, num_heads: int, d_key: int) -> QueryNorm:
    if kind == "batch":
        return QueryBatchNorm(num_heads, d_key)
    return QueryLayerNorm(d_key) if kind == "layer" else QueryNorm()
