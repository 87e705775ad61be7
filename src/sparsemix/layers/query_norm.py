"""Normalisation of product-key queries: batch statistics (the paper's), per-query LayerNorm, or none."""

from collections.abc import Mapping
from typing import Literal

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
    square: Tensor
    num_updates: Tensor

    def __init__(self, num_heads: int, d_key: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_heads, d_key))
        self.bias = nn.Parameter(torch.empty(num_heads, d_key))
        self.register_buffer("mean", torch.zeros(num_heads, d_key))
        self.register_buffer("square", torch.ones(num_heads, d_key))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, query: Float[Tensor, "N H C"], valid: Bool[Tensor, " N"] | None, causal: bool = False
    ) -> tuple[Float[Tensor, "N H C"], dict[str, Tensor]]:
        mean, square = self.mean.to(query.dtype), self.square.to(query.dtype)
        stats = {}
        if self.training:
            share = torch.ones_like(query[:, 0, 0]) if valid is None else valid.to(query.dtype)
            share = (share / share.sum().clamp_min(1))[:, None, None]
            seen = (query * share).sum(0), (query.square() * share).sum(0)  # (H, C) each
            stats = {"mean": seen[0].detach(), "square": seen[1].detach()}
            mean, square = (mean, square) if causal else seen
        if causal or not self.training:
            instead = "set query_norm to layer or none"
            check_observed(self.num_updates, "query batch statistics", self.training, instead)
        scale = (square - mean.square()).clamp_min(0).add(self.eps).rsqrt()
        return (query - mean) * scale * self.weight + self.bias, stats

    @torch.no_grad()
    def update(self, stats: Mapping[str, Tensor]) -> None:
        if "mean" not in stats:
            return
        self.num_updates += 1
        # A plain average at first, so that early steps do not lean on the initial values.
        step = max(self.momentum, 1.0 / int(self.num_updates))
        self.mean.lerp_(stats["mean"].to(self.mean), step)
        self.square.lerp_(stats["square"].to(self.square), step)

    def forget(self) -> None:
        self.num_updates.zero_()


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
