"""Which tokens of a sequence pass: quotas, selections of fixed size, and rules that need no later token."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsemix.layers.base import Ctx, Layer, valid_mean
from sparsemix.layers.linear import Linear

# A capacity falls in this many equal steps while it is annealed: each is a shape to compile for, and torch.compile
# gives up at its ninth.
ANNEAL_LEVELS = 4


def quota(capacity: float, seq_len: int, slack: float = 0.0) -> int:
    """Tokens of a sequence that pass: a ratio (up to 1) rounded up, or a number of tokens; at least 1. `slack` adds
    that share of the others. Raises ValueError where a program is exported for any length."""
    if torch.compiler.is_exporting() and isinstance(seq_len, torch.SymInt):
        raise ValueError(
            "torch.export: training takes a share of each row, so sizes follow from the length; call eval() first, or "
            "export a fixed length"
        )
    # The small offset keeps 0.1 * 30 from rounding up to 4.
    C = max(1, math.ceil(capacity * seq_len - 1e-9)) if capacity <= 1 else min(int(capacity), seq_len)
    return C + math.ceil(slack * (seq_len - C))


def row_quota(capacity: float, real: Int[Tensor, "B 1"], slack: float = 0.0) -> Float[Tensor, "B 1"]:
    """`quota` for rows of so many real tokens; 0 for an empty row."""
    # In fp32, 0.1 * 30 is already more than 3 by more than the offset.
    C = (real.double() * capacity - 1e-9).ceil() if capacity <= 1 else real.clamp_max(int(capacity)).double()
    return C + (slack * (real - C)).ceil()


class Annealing(Layer):
    """slack = (1 + cos(pi step / steps)) / 2, rounded up to one of `ANNEAL_LEVELS` equal levels, and 0 from `steps` on;
    `update` counts the optimizer's steps."""

    step: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        # A plain number beside the buffer: reading a tensor in forward would stall a GPU and break the graph.
        self.slack = 1.0
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_load_state_dict_post_hook(lambda module, _: module.set_slack())  # type: ignore[operator]

    def set_slack(self) -> None:
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, int(self.step) / self.steps)))
        self.slack = math.ceil(ANNEAL_LEVELS * share - 1e-9) / ANNEAL_LEVELS

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.step += 1
        self.set_slack()


class Predictor(Layer):
    """Logit that the router's top-k will take this token, from the token alone: down(silu(up x))."""

    roles = {"up": "predictor", "down": "predictor"}  # noqa: RUF012

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.up = Linear(d_model, width, bias=True)
        self.down = Linear(width, 1, bias=True)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> Float[Tensor, "B T"]:  # type: ignore[override]
        return self.down(F.silu(self.up(x)))[..., 0]


def top_tokens(
    ranks: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None, C: int, quota: Float[Tensor, "B 1"] | None
) -> tuple[Int[Tensor, "B C"], Bool[Tensor, "B C"] | None]:
    """The C best real tokens of every row, in order, ties to the earlier one, and which of them are within the row's
    quota (None: all, without padding)."""
    ranks = ranks.detach() if valid is None else ranks.detach().masked_fill(~valid, -torch.inf)
    ids, order = ranks.argsort(dim=1, descending=True, stable=True)[:, :C].sort(dim=1)
    return ids, None if valid is None or quota is None else (order < quota) & valid.gather(1, ids)


def first_tokens(
    wants: Bool[Tensor, "B T"], C: int, quota: Float[Tensor, "B 1"] | None
) -> tuple[Int[Tensor, "B C"], Bool[Tensor, "B C"]]:
    """The first C tokens of every row that want to pass, in order; and which of the places they fill."""
    ids = wanted_first(wants)[:, :C]
    order = torch.arange(C, dtype=torch.long, device=ids.device)
    return ids, wants.gather(1, ids) & (order < (C if quota is None else quota))


def wanted_first(wants: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Places of every row: the wanted ones in order, then the others in order."""
    return (~wants).to(torch.uint8).argsort(dim=1, stable=True)


def strided(positions: Int[Tensor, "*B"], capacity: float) -> Bool[Tensor, "*B"]:
    """True for every (1 / capacity)-th position: those at which capacity * (p + 1) reaches another whole number."""
    # The offset absorbs the rounding of ratios such as 0.1.
    before, after = ((capacity * (positions.double() + more) + 1e-6).floor() for more in (0, 1))
    return after > before


def target_balance(
    scores: Float[Tensor, "B T"], wants: Bool[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None, share: float
) -> Float[Tensor, ""]:
    """f P / c + (1 - f)(1 - P) / (1 - c): f the share that wants to pass, P the mean sigmoid, c the wanted share.

    Switch's balance loss (arXiv:2101.03961, eq. 4) for two paths of unequal target; 1 at f = P = c. The paper asks for
    a balance loss and gives none."""
    anything = valid_mean(torch.ones_like(scores), valid)  # 0 where no token is real
    f = valid_mean(wants.to(scores.dtype), valid)
    P = valid_mean(scores.sigmoid(), valid)
    return anything * (f * P / share + (1 - f) * (1 - P) / (1 - share))


def uniform(positions: Int[Tensor, "*B"], salt: Int[Tensor, ""]) -> Float[Tensor, "*B"]:
    """A number in [0, 1) per position, the same in every row and call: a 32-bit integer hash."""
    low = 0xFFFFFFFF
    h = (positions + salt) & low
    for multiplier, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
        h = ((h ^ (h >> shift)) * multiplier) & low
    return (h ^ (h >> 16)).double() / 2.0**32


def agreement(confusion: Float[Tensor, "4"]) -> dict[str, Tensor]:
    """Accuracy, precision and recall of the causal rule against the top-k, for the log of a step; 0 where a rate has
    nothing to count."""
    tp, fp, fn, tn = confusion.unbind()
    parts = {"accuracy": (tp + tn, tp + fp + fn + tn), "precision": (tp, tp + fp), "recall": (tp, tp + fn)}
    return {name: part / whole.clamp_min(1) for name, (part, whole) in parts.items()}
