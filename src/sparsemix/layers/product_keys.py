"""Table rows looked up by product keys: what PEER and PKM share."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparsemix.layers.base import Cost
from sparsemix.layers.linear import ExactLinear, Linear
from sparsemix.layers.query_norm import QueryNorm, QueryNormKind, build_query_norm
from sparsemix.ops import native
from sparsemix.ops.precision import at_least_fp32
from sparsemix.ops.product_key_topk import product_key_topk

# Variance per channel of a SwiGLU feed-forward's output at initialisation: E[silu(g)^2] for g ~ N(0, 1). Layers that
# replace one start with it.
DENSE_OUTPUT_VARIANCE = 0.356


# torch.nn.utils.parametrize keeps parameters by name in a ModuleDict, whose methods are called keys and values.
RENAMED = {"keys": "sub_keys", "values": "value_vectors"}

ROLES = {"query": "query", "query_norm": "query", "sub_keys": "keys"}


@runtime_checkable
class ProductKeySettings(Protocol):
    """Settings that say how rows are found among n * n."""

    @property
    def n(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def d_key(self) -> int: ...
    @property
    def query_norm(self) -> QueryNormKind: ...
    @property
    def share_keys(self) -> bool: ...
    def rule(self, holds: bool, name: str, rule: str) -> None: ...


class Found(NamedTuple):
    """The rows that every head found, best first, their scores, and the query norm's observations."""

    scores: Float[Tensor, "N H K"]
    ids: Int[Tensor, "N H K"]
    stats: dict[str, Tensor]


def check(config: ProductKeySettings, size: str) -> None:
    """Refuse settings that no product keys can have; `size` names the one that must be n * n."""
    n, rows = config.n, getattr(config, size)
    config.rule(n * n == rows, size, f"must be a square; the nearest are {n**2} and {(n + 1) ** 2}")
    config.rule(config.top_k <= rows, "top_k", f"must lie in [1, {size}={rows}]")
    config.rule(config.d_key % 2 == 0, "d_key", "must be even: its halves meet the two key sides")


def side(num_rows: int) -> int:
    """Sub-keys per side: the root of the number of rows, rounded down."""
    return math.isqrt(num_rows)


def look_up_cost(config: ProductKeySettings, d_model: int, seq_len: int) -> Cost:
    """Query network, its norm, and the scores of all sub-keys."""
    width = config.num_heads * config.d_key
    norm = {"batch": 2 * width, "layer": 2 * config.d_key, "none": 0}[config.query_norm]
    keys = config.n * config.d_key * (1 if config.share_keys else config.num_heads)
    query = Cost.of("router", 2.0 * d_model * width * seq_len, (d_model + 1) * width + norm)
    return query + Cost.of("router", 2.0 * config.n * width * seq_len, keys)


def new_query(config: ProductKeySettings, d_model: int) -> tuple[Linear, QueryNorm]:
    """The query network, one linear layer with bias for all heads (as product-key memory's code), and its norm."""
    query = ExactLinear(d_model, config.num_heads * config.d_key, bias=True)
    return query, build_query_norm(config.query_norm, config.num_heads, config.d_key)


def new_keys(config: ProductKeySettings) -> nn.Parameter:
    """Empty sub-keys (2, n, d_key / 2), one set for all heads or one each."""
    sides = (2, config.n, config.d_key // 2)
    return nn.Parameter(torch.empty(sides if config.share_keys else (config.num_heads, *sides)))


def new_table(num_rows: int, d_model: int) -> nn.Parameter:
    """An empty table (num_rows, d_model), on huge pages where the system allows: its rows are read at random."""
    table = torch.empty(num_rows, d_model)
    native.huge_pages(table)
    return nn.Parameter(table)


def reset_keys(keys: Tensor) -> None:
    """U(-c, c) with c = (d_key / 2)^(-1/2), as in product-key memory's code; normalised queries then meet a sub-key
    with a score of variance 1/3, whatever d_key. The papers are silent."""
    bound = keys.shape[-1] ** -0.5
    nn.init.uniform_(keys, -bound, bound)


def look_up(
    config: ProductKeySettings,
    query: Linear,
    norm: QueryNorm,
    keys: Tensor,
    tokens: Float[Tensor, "N D"],
    valid: Bool[Tensor, " N"] | None,
    causal: bool,
) -> Found:
    """The top_k rows (i, j), numbered i * n + j, with the largest <q_0, keys_0i> + <q_1, keys_1j>, where the halves of
    q = norm(query(x)) meet the two key sides, in at least fp32. No scaling of scores, as in arXiv:1907.05242."""
    with torch.autocast(tokens.device.type, enabled=False):
        normed, stats = norm(query(at_least_fp32(tokens)).view(-1, config.num_heads, config.d_key), valid, causal)
        halves = normed.view(-1, config.num_heads, 2, config.d_key // 2)
        left, right, i, j = product_key_topk(halves, keys, config.top_k)  # (N, H, K) each
    return Found(left + right, i * config.n + j, {f"query_norm.{name}": value for name, value in stats.items()})
