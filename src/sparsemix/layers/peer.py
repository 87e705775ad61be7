"""PEER: a large pool of single-neuron experts, found by product keys."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_serializer, model_validator
from torch import Tensor, nn

from sparsemix.config import without_later
from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.product_keys import (
    DENSE_OUTPUT_VARIANCE,
    RENAMED,
    ROLES,
    check,
    look_up,
    look_up_cost,
    new_keys,
    new_query,
    new_table,
    reset_keys,
    side,
)
from sparsemix.layers.query_norm import QueryNormKind
from sparsemix.layers.router import usage_stats
from sparsemix.ops.peer_experts import peer_experts

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
    init_scale: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "PEERConfig":
        check(self, "num_experts")
        return self

    @model_serializer(mode="wrap")
    def _named(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return without_later(self, dump(self), ("init_scale",))

    @property
    def n(self) -> int:
        """Sub-keys per side."""
        return side(self.num_experts)

    @property
    def looks_ahead(self) -> bool:
        # Batch statistics of the queries are taken over whole sequences while training.
        return self.query_norm == "batch"

    def cost(self, d_model: int, seq_len: int) -> Cost:
        picked = self.num_heads * self.top_k * d_model
        experts = Cost.of("experts", 4.0 * picked * seq_len, 2 * self.num_experts * d_model, 2 * picked)
        return look_up_cost(self, d_model, seq_len) + experts

    def build(self, d_model: int) -> "PEER":
        return PEER(self, d_model)


class PEER(Layer):
    """Source: arXiv:2407.04153, section 2 and algorithm 1. The expert of sub-keys (i, j) is number i * n + j.

    Gates are taken after the top-k, per head. Heads share experts and, by default, sub-keys (the paper's text; its
    algorithm is ambiguous). Experts have no bias, the output is as wide as the input. d_key, activation and initial
    values are not stated there: w_in has unit-variance projections, w_out is scaled so that the output has the variance
    of the feed-forward it replaces, times `init_scale`."""

    tables = ("w_in", "w_out")
    roles = ROLES | {"w_in": "tables", "w_out": "tables"}
    renamed = RENAMED

    def __init__(self, config: PEERConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.query, self.query_norm = new_query(config, d_model)
        self.sub_keys = new_keys(config)
        self.w_in = new_table(config.num_experts, d_model)
        self.w_out = new_table(config.num_experts, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_keys(self.sub_keys)
        nn.init.normal_(self.w_in, std=self.w_in.shape[1] ** -0.5)
        nn.init.normal_(self.w_out, std=self.config.init_scale * self._w_out_std())

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
        finds = self.config, self.query, self.query_norm, self.sub_keys
        scores, ids, stats = look_up(*finds, tokens, valid, ctx.causal)
        gates, ids = GATES[config.gate](scores).flatten(1), ids.flatten(1)  # (N, H K)
        y = peer_experts(tokens, ids, gates, self.w_in, self.w_out, config.activation, self.row_grads).to(x.dtype)
        # Counting over the whole table takes longer than a step of decoding.
        if not self.training and ctx.cache is None:
            stats |= usage_stats(ids, gates, config.num_experts, valid)
        if ctx.picks:
            stats |= {"expert_ids": ids, "gates": gates.detach()}
        return y.view_as(x), Aux({}, stats)


GATES = {"softmax": lambda scores: scores.softmax(dim=-1), "sigmoid": torch.sigmoid, "relu": torch.relu}
