"""The contract every mechanism obeys: `forward(x, ctx) -> (y, Aux)`, where the caller adds y to x."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparsemix.config import Config
from sparsemix.layers.cache import Cache
from sparsemix.ops.precision import at_least_fp32


class Ctx(NamedTuple):
    """What a layer may know besides x. None means the default: positions 0..T-1, one document a row, every token
    real. `causal` asks routing to use its causal rule. While decoding, `cache` holds what attention layers saw before,
    and `rows` says which of its rows the rows of this batch are. `picks` asks expert layers for the statistics
    `expert_ids` and `gates` of every row that they route (see router.py's `picks_of`), `logits` asks routers for their
    scores."""

    positions: Int[Tensor, "B T"] | None = None
    doc_ids: Int[Tensor, "B T"] | None = None
    valid: Bool[Tensor, "B T"] | None = None
    rows: Int[Tensor, " B"] | None = None
    causal: bool = False
    cache: Cache | None = None
    picks: bool = False
    logits: bool = False

    def places(self, seq_len: int, device: torch.device) -> Int[Tensor, "b T"]:
        """The positions, 0..T-1 for every row unless they are given."""
        return (
            torch.arange(seq_len, dtype=torch.long, device=device)[None] if self.positions is None else self.positions
        )

    def pick(self, ids: Int[Tensor, "B C"], real: Bool[Tensor, "B C"] | None = None) -> "Ctx":
        """The context of tokens `ids` of every row; `real` False marks filling."""

        def at(per_token: Tensor | None) -> Tensor | None:
            return None if per_token is None else per_token.gather(1, ids)

        valid = at(self.valid)
        if real is not None:
            valid = real if valid is None else valid & real
        positions = ids if self.positions is None else at(self.positions)
        return self._replace(positions=positions, doc_ids=at(self.doc_ids), valid=valid)

    def pick_rows(self, rows: Int[Tensor, " b"]) -> "Ctx":
        """The context of a sub-batch: `rows` are positions in this batch."""

        def at(per_row: Tensor | None) -> Tensor | None:
            return None if per_row is None else per_row[rows]

        return self._replace(
            positions=at(self.positions),
            doc_ids=at(self.doc_ids),
            valid=at(self.valid),
            rows=rows if self.rows is None else self.rows[rows],
        )

    def split(self, num_heads: int) -> "Ctx":
        """The context after every token became `num_heads` sub-tokens: T -> T * num_heads."""

        def each(per_token: Tensor | None) -> Tensor | None:
            return None if per_token is None else per_token.repeat_interleave(num_heads, dim=1)

        return self._replace(positions=each(self.positions), doc_ids=each(self.doc_ids), valid=each(self.valid))


def _under(entries: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in entries.items()}


class Aux(NamedTuple):
    """What a layer says besides y: `losses` are scalars, already weighted; `stats` are detached observations; `logits`
    are every router's scores (n, E) of the tokens that it saw, in the order in which they ran, where a Ctx asks.
    A layer names its own entries, its parent prefixes them, so keys are module paths."""

    losses: dict[str, Tensor] = {}  # noqa: RUF012  (a NamedTuple default; never mutated)
    stats: dict[str, Tensor] = {}  # noqa: RUF012
    logits: dict[str, Tensor] = {}  # noqa: RUF012

    def under(self, prefix: str) -> "Aux":
        return Aux(*(_under(part, prefix) for part in self))

    def __or__(self, other: "Aux") -> "Aux":  # type: ignore[override]
        return Aux(*(mine | theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Cost:
    """What a layer costs.

    flops: forward FLOPs of one sequence (matrix multiplies, 2 per multiply-add; attention over the full square;
    index reads 0; PEER's looked-up rows count). items: the same by component. params: all of them.
    active_params, bytes: parameters and weight bytes (fp32; ternary 2 bits) that one token at batch 1 touches,
    in expectation."""

    items: dict[str, float] = field(default_factory=dict)
    params: int = 0
    active_params: float = 0.0
    bytes: float = 0.0

    @property
    def flops(self) -> float:
        return sum(self.items.values())

    def __add__(self, other: "Cost") -> "Cost":
        names = self.items | other.items
        items = {name: self.items.get(name, 0.0) + other.items.get(name, 0.0) for name in names}
        return Cost(
            items, self.params + other.params, self.active_params + other.active_params, self.bytes + other.bytes
        )

    def routed(self, share: float) -> "Cost":
        """The same FLOPs and parameters, of which one token touches only `share` in expectation."""
        return Cost(self.items, self.params, self.active_params * share, self.bytes * share)

    @classmethod
    def of(
        cls, item: str, flops: float, params: int = 0, active: float | None = None, weight_bytes: float = 4.0
    ) -> "Cost":
        """One component; `active` parameters per token default to all of them, each of `weight_bytes` bytes."""
        active = params if active is None else active
        return cls({item: flops}, params, active, weight_bytes * active)


class LayerConfig(Config):
    """Settings of a layer; the family root. `kind` picks the mechanism."""

    family: ClassVar[dict[str, type[Config]] | None] = {}

    def cost(self, d_model: int, seq_len: int) -> Cost:
        """Cost of this layer on one sequence, without building it."""
        raise NotImplementedError

    def build(self, d_model: int) -> "Layer":
        """The layer, parameters not yet drawn from the model's seed. Raises ConfigError on misfit widths."""
        raise NotImplementedError

    @property
    def looks_ahead(self) -> bool:
        """True if this layer or a child routes or normalises with later tokens while training."""
        return any(child.looks_ahead for child in self.children())

    def children(self) -> list["LayerConfig"]:
        """The layers directly inside this one."""
        return [value for name in type(self).model_fields if isinstance(value := getattr(self, name), LayerConfig)]


class Layer(nn.Module):
    """Base of every mechanism. `path` names its store in a cache; the model sets it."""

    path: str = ""

    # The entries of its own stats that `update` takes up, each of which it returns whenever it runs in training.
    observes: tuple[str, ...] = ()

    # Parameters whose rows are looked up. An optimizer that takes their gradients as factors (optim/loan.py) says so
    # here for as long as it lives.
    tables: ClassVar[tuple[str, ...]] = ()
    row_grads: bool = False
    tables_owner: Callable[[], object] | None = None

    # What its own parameters and those of children do, by name, for who sets learning rates (optim/rates.py).
    roles: Mapping[str, str] = {}

    # Old name -> today's, of parameters in weights that earlier versions wrote.
    renamed: ClassVar[Mapping[str, str]] = {}

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        raise NotImplementedError

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Running state moves by small steps, which 16 bits round away: it has at least fp32, whatever the default type
        is, and whatever the layer is cast to or loaded from."""
        if tensor is not None and tensor.is_floating_point():
            tensor = at_least_fp32(tensor)
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Layer":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, cast in self._buffers.items():
            if cast is not None and cast.is_floating_point() and cast.dtype.itemsize < 4:
                exact = before[name]
                assert exact is not None
                self._buffers[name] = exact.to(cast.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:  # type: ignore[override]
        # torch hands over a dictionary of its own, not the caller's.
        for old, new in self.renamed.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        for name in self._buffers:
            if (loaded := state_dict.get(prefix + name)) is not None and loaded.is_floating_point():
                state_dict[prefix + name] = at_least_fp32(loaded)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle hold: nothing that an optimizer of this layer owns."""
        state = dict(vars(self))
        for name in ("row_grads", "tables_owner"):
            state.pop(name, None)
        return state

    def default_ctx(self) -> Ctx:
        """What `layer(x)` alone means: causal unless training."""
        return Ctx(causal=not self.training)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        """Move running state (batch statistics, thresholds) by one step's observations, which hold those entries named
        in `observes` that forward returned. Most layers have none."""

    def forget(self) -> None:
        """Return running state to never observed. Most layers have none."""

    def reset_parameters(self) -> None:
        """Draw this module's own parameters (not its children's). Most wrappers own none."""


def check_observed(num_updates: Int[Tensor, ""], what: str, training: bool, instead: str) -> None:
    """Raises RuntimeError where running state that a causal rule reads was never observed; an exported program too."""
    way = "train first (sparsemix.update(module, aux.stats) after every step; a transformers model does so itself)"
    if training:
        way = "a training call without labels, or with Ctx(causal=True), reads them: pass labels, or train first"
    message = f"{what} were never observed: {way}, or {instead}"
    if torch.compiler.is_exporting():
        # Not torch._check, whose message is lost on the way.
        torch._assert_async(num_updates > 0, message)  # type: ignore[attr-defined]
    elif not num_updates:
        raise RuntimeError(message)


def valid_mean(values: Float[Tensor, "*B"], valid: Bool[Tensor, "*B"] | None) -> Float[Tensor, ""]:
    """Mean over real tokens; 0 of none."""
    if valid is None:
        return values.sum() / torch.sym_max(1, values.numel())
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp_min(1)


def valid_only(values: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B T"]:
    """0 where a token is padding."""
    return values if valid is None else torch.where(valid, values, 0.0)
