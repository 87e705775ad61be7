"""Causal self-attention with rotary positions and grouped key-value heads."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_serializer, model_validator
from torch import Tensor
from torch.nn import functional as F

from sparsemix.config import Config, ConfigError, named
from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.linear import Linear
from sparsemix.layers.norm import EPS, RMSNorm
from sparsemix.layers.rotary import RopeScaling, rotate, rotation
from sparsemix.layers.ternary import FLOAT, PrecisionConfig


class QKNormConfig(Config):
    """RMSNorm of queries and keys before they are rotated: of every `head` apart (one gain for all of them), or over
    the `full` width. A plain name, such as `head`, stands for `{over: head}`."""

    over: Literal["none", "head", "full"] = "none"
    eps: float = Field(default=EPS, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, raw: Any) -> Any:
        return named("over", raw, ("none", "head", "full"))

    @model_serializer(mode="wrap")
    def _short(self, handler: Any) -> str | dict[str, Any]:
        return self.over if self.eps == EPS else handler(self)

    def width(self, d_head: int, num_heads: int) -> int:
        """Channels normed together; 0 without a norm."""
        return {"none": 0, "head": d_head, "full": d_head * num_heads}[self.over]

    def build(self, d_head: int, num_heads: int) -> RMSNorm | None:
        width = self.width(d_head, num_heads)
        return RMSNorm(width, self.eps) if width else None


class AttentionConfig(LayerConfig):
    """softmax(q k^T / sqrt(d_head)) v over earlier tokens of the same document, with rotary positions.

    d_head: null means d_model / num_heads. bias: of the projections into heads, or of all four. window: a token sees
    keys fewer than so many positions back, itself included; null means all. rope_theta: null means no rotation."""

    kind: Literal["attention"] = "attention"
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    d_head: int | None = Field(default=None, ge=1)
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: QKNormConfig = QKNormConfig()
    window: int | None = Field(default=None, ge=1)
    rope_theta: float | None = Field(default=10_000.0, gt=1)
    rope_scaling: RopeScaling | None = None
    precision: PrecisionConfig = FLOAT

    @model_validator(mode="after")
    def _rules(self) -> "AttentionConfig":
        self.rule(self.num_heads % self.kv_heads == 0, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        turned = self.rope_theta is not None
        self.rule(not turned or (self.d_head or 2) % 2 == 0, "d_head", "must be even, or rope_theta null")
        self.rule(turned or self.rope_scaling is None, "rope_theta", "must be a number where rope_scaling is set")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def head_width(self, d_model: int) -> int:
        """Channels of one head. Raises ConfigError if d_model does not give them."""
        if self.d_head is not None:
            return self.d_head
        pair, even = (1, "a whole") if self.rope_theta is None else (2, "an even")
        if d_model % (pair * self.num_heads):
            raise ConfigError(
                f"num_heads={self.num_heads} must give every head {even} width: d_model={d_model} is no multiple of "
                f"{pair * self.num_heads}; choose another num_heads or d_model, or set d_head"
            )
        return d_model // self.num_heads

    def cost(self, d_model: int, seq_len: int) -> Cost:
        d_head = self.head_width(d_model)
        width, kv_width = self.num_heads * d_head, self.kv_heads * d_head
        params = 2 * d_model * (width + kv_width)
        vectors = {"none": 0, "qkv": width + 2 * kv_width, "all": width + 2 * kv_width + d_model}[self.bias]
        vectors += self.qk_norm.width(d_head, self.num_heads) + self.qk_norm.width(d_head, self.kv_heads)
        vectors += width if self.precision.normed else 0
        scores = Cost.of("attention", 4.0 * seq_len * seq_len * width)
        linear = Cost.of("linear", 2.0 * params * seq_len, params, weight_bytes=self.precision.weight_bytes)
        return linear + Cost.of("linear", 0.0, vectors) + scores

    def build(self, d_model: int) -> "Attention":
        return Attention(self, d_model)


class Attention(Layer):
    """A token sees a key iff the key is real, not later, within the window, and of the same document; a cache adds the
    keys of earlier calls, each with the rotation of its own position. Norms of queries and keys: arXiv:2302.05442."""

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.rope_theta, self.rope_scaling, self.window = config.rope_theta, config.rope_scaling, config.window
        self.d_head = config.head_width(d_model)
        width, kv_width = self.num_heads * self.d_head, self.num_kv_heads * self.d_head
        self.q = Linear(d_model, width, config.bias != "none", precision=config.precision)
        self.k = Linear(d_model, kv_width, config.bias != "none", precision=config.precision)
        self.v = Linear(d_model, kv_width, config.bias != "none", precision=config.precision)
        self.q_norm = config.qk_norm.build(self.d_head, self.num_heads)
        self.k_norm = config.qk_norm.build(self.d_head, self.num_kv_heads)
        self.sub_norm = RMSNorm(width) if config.precision.normed else None
        self.o = Linear(width, d_model, config.bias == "all", precision=config.precision)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        B, T, _ = x.shape
        positions = ctx.places(T, x.device)
        q = normed(self.q(x), self.q_norm).view(B, T, self.num_heads, self.d_head).transpose(1, 2)  # (B, H, T, d_head)
        k = normed(self.k(x), self.k_norm).view(B, T, self.num_kv_heads, self.d_head).transpose(1, 2)
        v = self.v(x).view(B, T, self.num_kv_heads, self.d_head).transpose(1, 2)
        if self.rope_theta is not None:
            turn = (positions, self.d_head, self.rope_theta, x.dtype, self.rope_scaling)
            cos, sin = rotation(*turn) if ctx.cache is None else ctx.cache.once(rotation, *turn)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if ctx.cache is None:
            mask = visible(ctx, T, positions, self.window)
        else:
            k, v, mask = ctx.cache.append(self.path, ctx.rows, k, v, positions, ctx.doc_ids, ctx.valid, self.window)
        # With a cache one token sees all keys; without one its triangle is itself, and no length need be asked, which
        # an exported program does not know.
        causal = mask is None and (ctx.cache is None or T > 1)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.num_kv_heads != self.num_heads
        )
        y = y.transpose(1, 2).flatten(2)
        return self.o(y if self.sub_norm is None else self.sub_norm(y)), Aux()


def normed(y: Float[Tensor, "B T W"], norm: RMSNorm | None) -> Float[Tensor, "B T W"]:
    """y with every stretch of the norm's width normed: one head's channels, or all of them."""
    return y if norm is None else norm(y.unflatten(2, (-1, norm.normalized_shape[0]))).flatten(2)


def visible(ctx: Ctx, T: int, positions: Int[Tensor, "b T"], window: int | None) -> Bool[Tensor, "B 1 T T"] | None:
    """Which key each query sees; None for the plain causal triangle.

    Tokens come in position order, so later in the row means later in the document. A filling query sees
    itself, which keeps its softmax finite."""
    near = None
    # Positions that count on from 0 are nowhere further apart than T - 1; in an exported program T may be anything.
    if window is not None and (ctx.positions is not None or torch.compiler.is_exporting() or window < T):
        near = positions[:, :, None] - positions[:, None, :] < window  # (b, T, T)
    if ctx.doc_ids is None and ctx.valid is None and near is None:
        return None
    mask = torch.ones(T, T, dtype=torch.bool, device=positions.device).tril()[None]  # (1, T, T)
    if near is not None:
        mask = mask & near
    if ctx.doc_ids is not None:
        mask = mask & (ctx.doc_ids[:, :, None] == ctx.doc_ids[:, None, :])
    if ctx.valid is not None:
        mask = (mask & ctx.valid[:, None, :]) | torch.eye(T, dtype=torch.bool, device=mask.device)
    return mask[:, None]
