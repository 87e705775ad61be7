"""PEER: a large pool of single-neuron experts, found by product keys."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.linear import ACTIVATIONS, Linear
from sparsemix.layers.query_norm import QueryNormKind, build_query_norm
from sparsemix.layers.router import at_least_fp32, usage_stats
from sparsemix.ops.product_key_topk import product_key_topk
from sparsemix.ops.row_dot import row_dot
from sparsemix.ops.row_mix import row_mix

# Variance per channel of a SwiGLU feed-forward's output at initialisation: E[silu(g)^2] for g ~ N(0, 1).
DENSE_OUTPUT_VARIANCE = 0.356
# E[act(z)^2] for z ~ N(0, 1).
ACTIVATION_VARIANCE = {"gelu": 0.425, "relu": 0.5, "silu": 0.356}


class PEERConfig(LayerConfig):
    """y = sum over heads and their top_k experts of g_i act(w_in_i . x) w_out_i, with num_experts = n^2."""

    kind: Literal["peer"] = "peer"
    num_experts: int = Field(ge=1)
    num_heads: int = Field(default=8, ge=1)
    top_k: int = Field(default=16, ge=1)
    d_key: int = Field(default=256, ge=2)
    gate: Literal["softmax", "sigmoid", "relu"] = "softmax"
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    query_norm: QueryNormKind = "batch"
    share_keys: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "PEERConfig":
        n = math.isqrt(self.num_experts)
        self.rule(
            n * n == self.num_experts, "num_experts", f"must be a square; the nearest are {n**2} and {(n + 1) ** 2}"
        )
        self.rule(self.top_k <= self.num_experts, "top_k", f"must lie in [1, num_experts={self.num_experts}]")
        self.rule(self.d_key % 2 == 0, "d_key", "must be even: its halves meet the two key sides")
        return self

    @property
    def n(self) -> int:
        """Sub-keys per side."""
        return math.isqrt(self.num_experts)

    @property
    def looks_ahead(self) -> bool:
        # Batch statistics of the queries are taken over whole sequences while training.
        return self.query_norm == "batch"

    def cost(self, d_model: int, seq_len: int) -> Cost:
        width = self.num_heads * self.d_key
        norm = {"batch": 2 * width, "layer": 2 * self.d_key, "none": 0}[self.query_norm]
        keys = self.n * self.d_key * (1 if self.share_keys else self.num_heads)
        query = Cost.of("router", 2.0 * d_model * width * seq_len, (d_model + 1) * width + norm)
        scores = Cost.of("router", 2.0 * self.num_heads * self.n * self.d_key * seq_len, keys)
        picked = self.num_heads * self.top_k * d_model
        return query + scores + Cost.of("experts", 4.0 * picked * seq_len, 2 * self.num_experts * d_model, 2 * picked)

    def build(self, d_model: int) -> "PEER":
        return PEER(self, d_model)


class PEER(Layer):
    """Source: arXiv:2407.04153, section 2 and algorithm 1. The expert of sub-keys (i, j) is number i * n + j.

    Gates are taken after the top-k, per head. Heads share experts and, by default, sub-keys (the paper's text; its
    algorithm is ambiguous). Experts have no bias. d_key, activation and initial values are not stated there: w_in has
    unit-variance projections, w_out is scaled so that the output has the variance of the feed-forward it replaces."""

    def __init__(self, config: PEERConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        sides = (2, config.n, config.d_key // 2)
        self.query = Linear(d_model, config.num_heads * config.d_key, bias=True)
        self.query_norm = build_query_norm(config.query_norm, config.num_heads, config.d_key)
        self.keys = nn.Parameter(torch.empty(sides if config.share_keys else (config.num_heads, *sides)))
        self.w_in = nn.Parameter(torch.empty(config.num_experts, d_model))
        self.w_out = nn.Parameter(torch.empty(config.num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        d_model = self.w_in.shape[1]
        # As in product-key memory's code (arXiv:1907.05242); the paper is silent.
        bound = (self.config.d_key // 2) ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.normal_(self.w_in, std=d_model**-0.5)
        nn.init.normal_(self.w_out, std=self._w_out_std())

    def _w_out_std(self) -> float:
        """Output variance per channel is (sum of squared gates) * E[act^2] * std^2; solved for the dense layer's."""
        H, K = self.config.num_heads, self.config.top_k
        # Initial scores have variance 2/3, so the winners of many lie near 2.5: sigmoid 0.92, relu 2.5. A softmax
        # over so close a field is nearly uniform.
        squared_gates = {"softmax": H / K, "sigmoid": 0.85 * H * K, "relu": 6.0 * H * K}[self.config.gate]
        return (DENSE_OUTPUT_VARIANCE / (ACTIVATION_VARIANCE[self.config.activation] * squared_gates)) ** 0.5

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        config, tokens = self.config, x.flatten(0, 1)  # (N, D)
        valid = None if ctx.valid is None else ctx.valid.flatten()
        left, right, stats = self.side_scores(tokens, valid, ctx.causal)  # (N, H, n) each
        i, j = product_key_topk(left.detach(), right.detach(), config.top_k)  # (N, H, K) each
        scores = left.gather(-1, i) + right.gather(-1, j)
        gates = GATES[config.gate](scores).flatten(1)  # (N, H K)
        expert_ids = (i * config.n + j).flatten(1)
        hidden = ACTIVATIONS[config.activation](row_dot(tokens, expert_ids, self.w_in))
        y = row_mix(gates.to(hidden.dtype) * hidden, expert_ids, self.w_out).to(x.dtype)
        if not self.training:
            stats |= usage_stats(expert_ids, gates, config.num_experts, valid)
        return y.view_as(x), Aux({}, stats)

    def side_scores(
        self, tokens: Float[Tensor, "N D"], valid: Bool[Tensor, " N"] | None, causal: bool
    ) -> tuple[Float[Tensor, "N H n"], Float[Tensor, "N H n"], dict[str, Tensor]]:
        """Inner products of both query halves with their sub-keys, in at least fp32."""
        config = self.config
        with torch.autocast(tokens.device.type, enabled=False):
            query = self.query(at_least_fp32(tokens)).view(-1, config.num_heads, config.d_key)
            query, stats = self.query_norm(query, valid, causal)
            halves = query.view(-1, config.num_heads, 2, config.d_key // 2)
            equation = "nhpc,pmc->pnhm" if config.share_keys else "nhpc,hpmc->pnhm"
            left, right = torch.einsum(equation, halves, at_least_fp32(self.keys))
        return left, right, {f"query_norm.{name}": value for name, value in stats.items()}


GATES = {"softmax": lambda scores: scores.softmax(dim=-1), "sigmoid": torch.sigmoid, "relu": torch.relu}
