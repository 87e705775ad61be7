"""The language model: embed, blocks, norm, head, loss in nats."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemix.config import Config, ConfigError, parse
from sparsemix.layers import AttentionConfig, Aux, BesideConfig, BlockConfig, Cost, Ctx, DenseConfig, Layer, LayerConfig
from sparsemix.layers.norm import RMS, NormConfig
from sparsemix.layers.ternary import FLOAT, PrecisionConfig
from sparsemix.ops.cross_entropy import NO_TARGET, cross_entropy
from sparsemix.patterns import expand_blocks


class ModelConfig(Config):
    """A decoder-only language model; every block is a layer of its own.

    norm: of the final norm, and of every block that gives none itself. tie_embeddings: is the head the embedding?
    learned_positions: rows of a table that is added to the embedding by position, 0 for none."""

    d_model: int = Field(ge=2)
    vocab_size: int = Field(ge=2)
    seq_len: int = Field(ge=1)
    blocks: tuple[LayerConfig, ...] = Field(min_length=1)
    norm: NormConfig = RMS
    tie_embeddings: bool = True
    learned_positions: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        rows = self.learned_positions
        self.rule(not rows or self.seq_len <= rows, "seq_len", f"must be at most learned_positions={rows}")
        return self

    # Outermost, so that the shorthands are gone before names are checked.
    @model_validator(mode="wrap")
    @classmethod
    def _expand(cls, raw: Any, handler: Any) -> Any:
        return handler(spread_shorthands(expand_blocks(raw)) if isinstance(raw, dict) else raw)

    @property
    def looks_ahead(self) -> bool:
        return any(block.looks_ahead for block in self.blocks)

    def cost(self, seq_len: int | None = None) -> Cost:
        """Cost of one sequence: blocks, final norm, logits. A lookup touches one row; a tied table is one table."""
        T, D, V = seq_len or self.seq_len, self.d_model, self.vocab_size
        total = Cost.of("logits", 2.0 * D * V * T, V * D) + Cost.of("linear", 0.0, self.norm.num_params(D))
        for rows in (self.learned_positions, 0 if self.tie_embeddings else V):
            total += Cost.of("linear", 0.0, rows * D, D if rows else 0)
        for block in self.blocks:
            total += block.cost(D, T)
        return total

    def outside_flops(self) -> float:
        """Forward FLOPs of one sequence spent outside routed layers: attention, dense layers, logits."""
        logits = 2.0 * self.d_model * self.vocab_size * self.seq_len
        return logits + sum(_outside(block, self.d_model, self.seq_len) for block in self.blocks)

    def build(self, seed: int = 0) -> "LM":
        """The model with parameters drawn from `seed`. Raises ConfigError on misfit widths."""
        return LM(self, seed)


def _outside(config: LayerConfig, d_model: int, seq_len: int) -> float:
    if isinstance(config, (BlockConfig, BesideConfig)):
        return sum(_outside(child, d_model, seq_len) for child in config.children())
    if isinstance(config, (AttentionConfig, DenseConfig)):
        return config.cost(d_model, seq_len).flops
    return 0.0


class _Shorthands(Config):
    precision: PrecisionConfig = FLOAT
    norm: NormConfig = RMS


def spread_shorthands(raw: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model with its `precision` and its `norm` written into every layer that has the setting and gives
    none itself. The norm is the model's own as well.

    Layers without the setting (PEER's tables, routers, query norms, the embedding) stay as they are. Raises
    ConfigError."""
    given = {name: raw[name] for name in _Shorthands.model_fields if name in raw}
    if not given:
        return raw
    words = parse(_Shorthands, given).model_dump(include=set(given))

    def spread(node: Any) -> Any:
        if isinstance(node, (list, tuple)):
            return [spread(part) for part in node]
        if not isinstance(node, dict):
            return node
        known = (LayerConfig.family or {}).get(str(node.get("kind")))
        own = {} if known is None else {name: word for name, word in words.items() if name in known.model_fields}
        return own | {name: spread(value) for name, value in node.items()}

    rest = {name: value for name, value in raw.items() if name != "precision"}
    return rest | {"blocks": spread(rest.get("blocks"))}


class Output(NamedTuple):
    """Logits of every token, and what the layers said."""

    logits: Float[Tensor, "B T V"]
    aux: Aux


class Loss(NamedTuple):
    """Mean nats of the tokens that have a target, every token's (0 without a target, no gradient), and what the layers
    said."""

    mean: Float[Tensor, ""]
    nats: Float[Tensor, "B T"]
    aux: Aux


def after(block: nn.Module, x: Float[Tensor, "B T D"], ctx: Ctx) -> tuple[Float[Tensor, "B T D"], Aux]:
    """The stream after a block: x + block(x)."""
    y, aux = block(x, ctx)
    return x + y, aux


# How a block is run: `after`, or the same compiled or recomputed (step.py).
BlockRunner = Callable[[nn.Module, Tensor, Ctx], tuple[Tensor, Aux]]


class LM(nn.Module):
    """logits = norm(x_L) W^T with x_0 = E[tokens] (+ P[positions]), x_{l+1} = x_l + block_l(x_l); tied W is E.

    Initial values: E, P and W N(0, 0.02^2), linear layers N(0, 1/d_in), norms 1, the rest as its layer says. Every
    module draws from a generator seeded by its own name, so models of different kinds start with the same values in
    the parts they share."""

    roles = {"lm_head": "embedding"}  # noqa: RUF012

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        rows = config.learned_positions
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(rows, config.d_model) if rows else None
        self.blocks = nn.ModuleList(_build(block, config.d_model, i) for i, block in enumerate(config.blocks))
        self.norm = config.norm.build(config.d_model)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                module.path = name
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        devices = [] if self.embed.weight.device.type in ("cpu", "meta") else [self.embed.weight.device]
        with torch.random.fork_rng(devices=devices):
            for name, module in self.named_modules():
                if isinstance(module, Layer) or any(True for _ in module.parameters(recurse=False)):
                    torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                    reset = module.reset_parameters
                    assert callable(reset)
                    reset()
            for name in ("embed", "positions", "lm_head"):
                if (module := getattr(self, name)) is not None:
                    torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                    nn.init.normal_(module.weight, std=0.02)

    @property
    def head(self) -> Float[Tensor, "V D"]:
        """The weight that turns the stream into logits."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: Int[Tensor, "B T"], ctx: Ctx | None = None) -> Output:
        """Logits in the dtype of the model (or of autocast); ctx defaults to causal unless training. With a cache,
        tokens continue what it has seen and positions default to counting on."""
        ctx = self.placed(tokens, ctx or Ctx(causal=not self.training))
        x, aux = self.hidden(tokens, ctx)
        return Output(self.logits(x), aux)

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return F.linear(x, self.head) if self.lm_head is None else self.lm_head(x)

    def placed(self, tokens: Int[Tensor, "B T"], ctx: Ctx) -> Ctx:
        """The context of tokens that a cache, if there is one, has now seen: positions count on unless they are given.
        Raises ValueError for a cache without causal routing."""
        if ctx.cache is None:
            return ctx
        if not ctx.causal:
            raise ValueError("a cache needs causal routing: pass Ctx(causal=True, cache=...)")
        # Without padding no layer needs a mask.
        valid = None if ctx.valid is None or bool(ctx.valid.all()) else ctx.valid
        positions = ctx.cache.advance(tokens.shape[1], ctx.rows, valid, ctx.positions).to(tokens.device)
        return ctx._replace(positions=positions, valid=valid)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        ctx: Ctx | None = None,
        run: BlockRunner = after,
        impl: str = "auto",
    ) -> Loss:
        """Cross-entropy of the targets (-100: none) without the logits of all tokens at a time; ctx defaults to causal
        unless training. `run` runs the blocks."""
        x, aux = self.hidden(tokens, ctx or Ctx(causal=not self.training), run)
        return Loss(*self.nats(x, targets, impl), aux)

    def nats(self, x: Tensor, targets: Int[Tensor, "B T"], impl: str = "auto") -> tuple[Tensor, Float[Tensor, "B T"]]:
        """The mean and every token's cross-entropy from the stream (B, T, D)."""
        if self.lm_head is not None and not isinstance(self.lm_head, nn.Linear):
            # An adapter around the head is more than its weight.
            nats = token_nats(self.lm_head(x), targets)
            return nats.sum() / (targets != NO_TARGET).sum().clamp_min(1), nats.detach()
        mean, nats = cross_entropy(x.flatten(0, 1), self.head, targets.flatten(), impl)
        return mean, nats.view_as(targets)

    def hidden(
        self, tokens: Int[Tensor, "B T"], ctx: Ctx, run: BlockRunner = after
    ) -> tuple[Float[Tensor, "B T D"], Aux]:
        """What the head reads: norm(x_L). Raises ConfigError where a token lies beyond the learned positions."""
        x, aux = self.embed(tokens), Aux({}, {})
        if self.positions is not None:
            # Without given positions the last one is known, and a GPU need not be waited for.
            last = tokens.shape[1] - 1 if ctx.positions is None else int(ctx.positions.max())
            check_room(last, self.positions.num_embeddings)
            x = x + self.positions(ctx.places(tokens.shape[1], tokens.device))
        for i, block in enumerate(self.blocks):
            x, said = run(block, x, ctx)
            aux |= said.under(f"blocks.{i}")
        return self.norm(x), aux


def _build(config: LayerConfig, d_model: int, i: int) -> Layer:
    try:
        return config.build(d_model)
    except ConfigError as error:
        raise ConfigError(f"blocks.{i}: {error}") from None


def check_room(last: int, rows: int) -> None:
    """Raises ConfigError."""
    if last >= rows:
        raise ConfigError(
            f"learned_positions={rows} must cover every token: one is at position {last}; "
            "give a shorter prompt, or generate fewer tokens"
        )


def token_nats(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-log p(target) in nats, at least fp32; 0 where the target is -100."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
