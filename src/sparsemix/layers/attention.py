"""Causal self-attention with rotary positions and grouped key-value heads."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from sparsemix.config import ConfigError
from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.block import RMSNorm
from sparsemix.layers.linear import Linear
from sparsemix.layers.ternary import FLOAT, PrecisionConfig


class AttentionConfig(LayerConfig):
    """softmax(q k^T / sqrt(d_head)) v over earlier tokens of the same document, with rotary positions."""

    kind: Literal["attention"] = "attention"
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    rope_theta: float = Field(default=10_000.0, gt=1)
    precision: PrecisionConfig = FLOAT

    @model_validator(mode="after")
    def _heads(self) -> "AttentionConfig":
        kv = self.num_kv_heads or self.num_heads
        self.rule(self.num_heads % kv == 0, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        return self

    def d_head(self, d_model: int) -> int:
        if d_model % (2 * self.num_heads):
            raise ConfigError(
                f"num_heads={self.num_heads} must give every head an even width: d_model={d_model} is no multiple of "
                f"{2 * self.num_heads}; choose another num_heads or d_model"
            )
        return d_model // self.num_heads

    def cost(self, d_model: int, seq_len: int) -> Cost:
        kv_width = self.d_head(d_model) * (self.num_kv_heads or self.num_heads)
        params = 2 * d_model * d_model + 2 * d_model * kv_width
        scores = Cost.of("attention", 4.0 * seq_len * seq_len * d_model)
        linear = Cost.of("linear", 2.0 * params * seq_len, params, weight_bytes=self.precision.weight_bytes)
        return linear + Cost.of("linear", 0.0, d_model if self.precision.normed else 0) + scores

    def build(self, d_model: int) -> "Attention":
        return Attention(self, d_model)


class Attention(Layer):
    """A token sees a key iff the key is real, not later, and of the same document; a cache adds the keys of earlier
    calls, each with the rotation of its own position. Rotary positions:
    arXiv:2104.09864 (first and second half of a head's channels form the pairs)."""

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.rope_theta = config.rope_theta
        d_head = config.d_head(d_model)
        self.q = Linear(d_model, d_model, precision=config.precision)
        self.k = Linear(d_model, self.num_kv_heads * d_head, precision=config.precision)
        self.v = Linear(d_model, self.num_kv_heads * d_head, precision=config.precision)
        self.sub_norm = RMSNorm(d_model) if config.precision.normed else None
        self.o = Linear(d_model, d_model, precision=config.precision)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        B, T, D = x.shape
        positions = ctx.places(T, x.device)
        cos, sin = rotation(positions, D // self.num_heads, self.rope_theta, x.dtype)
        q = rotate(self.q(x).view(B, T, self.num_heads, -1).transpose(1, 2), cos, sin)  # (B, H, T, d_head)
        k = rotate(self.k(x).view(B, T, self.num_kv_heads, -1).transpose(1, 2), cos, sin)
        v = self.v(x).view(B, T, self.num_kv_heads, -1).transpose(1, 2)
        if ctx.cache is None:
            mask = visible(ctx, T)
        else:
            k, v, mask = ctx.cache.append(self.path, ctx.rows, k, v, positions, ctx.doc_ids, ctx.valid)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_kv_heads != self.num_heads
        )
        y = y.transpose(1, 2).reshape(B, T, D)
        return self.o(y if self.sub_norm is None else self.sub_norm(y)), Aux()


def visible(ctx: Ctx, T: int) -> Bool[Tensor, "B 1 T T"] | None:
    """Which key each query sees; None for the plain causal triangle.

    Tokens come in position order, so later in the row means later in the document. A filling query sees
    itself, which keeps its softmax finite."""
    if ctx.doc_ids is None and ctx.valid is None:
        return None
    per_token = ctx.doc_ids if ctx.doc_ids is not None else ctx.valid
    assert per_token is not None
    mask = torch.ones(T, T, dtype=torch.bool, device=per_token.device).tril()[None]  # (1, T, T)
    if ctx.doc_ids is not None:
        mask = mask & (ctx.doc_ids[:, :, None] == ctx.doc_ids[:, None, :])
    if ctx.valid is not None:
        mask = (mask & ctx.valid[:, None, :]) | torch.eye(T, dtype=torch.bool, device=mask.device)
    return mask[:, None]


def rotation(
    positions: Int[Tensor, "B T"], d_head: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "B 1 T d"], Float[Tensor, "B 1 T d"]]:
    """Cosine and sine of position * theta^(-2i/d_head), computed in fp32 (fp64 for fp64 inputs)."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.arange(0, d_head, 2, device=positions.device, dtype=exact) / d_head
    angle = positions[:, None, :, None].to(exact) * theta**-steps  # (B, 1, T, d_head / 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(
    x: Float[Tensor, "B H T e"], cos: Float[Tensor, "b 1 T d"], sin: Float[Tensor, "b 1 T d"]
) -> Float[Tensor, "B H T e"]:
    """x with each channel pair (i, i + d_head/2) turned by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
