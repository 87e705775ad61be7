"""PKM: a large memory of value vectors, found by product keys."""

from collections.abc import Callable
from typing import Any, Literal

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
from sparsemix.ops.row_mix import row_mix


class PKMConfig(LayerConfig):
    """y = sum over heads and their top_k values of g_i values_i, with num_values = n^2."""

    kind: Literal["pkm"] = "pkm"
    num_values: int = Field(ge=1)
    num_heads: int = Field(default=8, ge=1)
    top_k: int = Field(default=32, ge=1)
    d_key: int = Field(default=256, ge=2)
    query_norm: QueryNormKind = "batch"
    share_keys: bool = False
    init_scale: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "PKMConfig":
        check(self, "num_values")
        return self

    @model_serializer(mode="wrap")
    def _named(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return without_later(self, dump(self), ("init_scale",))

    @property
    def n(self) -> int:
        """Sub-keys per side."""
        return side(self.num_values)

    @property
    def looks_ahead(self) -> bool:
        # Batch statistics of the queries are taken over whole sequences while training.
        return self.query_norm == "batch"

    def cost(self, d_model: int, seq_len: int) -> Cost:
        picked = self.num_heads * self.top_k * d_model
        values = Cost.of("experts", 2.0 * picked * seq_len, self.num_values * d_model, picked)
        return look_up_cost(self, d_model, seq_len) + values

    def build(self, d_model: int) -> "PKM":
        return PKM(self, d_model)


class PKM(Layer):
    """Source: arXiv:1907.05242, section 3. The value of sub-keys (i, j) is number i * n + j.

    Gates are a softmax over each head's top_k scores. Heads have their own queries and, by default, their own sub-keys
    (as in the paper), and share the values. The update is added to the stream, as the paper's memory layer is. Values
    start with the output variance of the feed-forward they replace; the paper's code draws N(0, 1 / d_model), far
    smaller: `init_scale` is times what makes that variance."""

    tables = ("value_vectors",)
    roles = ROLES | {"value_vectors": "tables"}
    renamed = RENAMED

    def __init__(self, config: PKMConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.query, self.query_norm = new_query(config, d_model)
        self.sub_keys = new_keys(config)
        self.value_vectors = new_table(config.num_values, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_keys(self.sub_keys)
        # Nearly uniform gates: the output's variance is (heads / top_k) * std^2.
        std = (DENSE_OUTPUT_VARIANCE * self.config.top_k / self.config.num_heads) ** 0.5
        nn.init.normal_(self.value_vectors, std=self.config.init_scale * std)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        tokens = x.flatten(0, 1)  # (N, D)
        valid = None if ctx.valid is None else ctx.valid.flatten()
        finds = self.config, self.query, self.query_norm, self.sub_keys
        scores, ids, stats = look_up(*finds, tokens, valid, ctx.causal)
        gates, ids = scores.softmax(dim=-1).flatten(1), ids.flatten(1)  # (N, H K)
        y = row_mix(gates, ids, self.value_vectors, self.row_grads).to(x.dtype)
        # Counting over the whole table takes longer than a step of decoding.
        if not self.training and ctx.cache is None:
            stats |= usage_stats(ids, gates, self.config.num_values, valid)
        if ctx.picks:
            stats |= {"expert_ids": ids, "gates": gates.detach()}
        return y.view_as(x), Aux({}, stats)
