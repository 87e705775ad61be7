"""The sizes of an isoFLOP study, from what they cost alone: a ladder around the predicted optimum, and its extension.

A size is placed by F, its forward FLOPs per token: at a budget C it trains on D = C / 3F tokens, whatever its kind."""

from collections.abc import Iterator, Mapping, Sequence
from math import log, sqrt
from typing import NamedTuple

import numpy as np

from sparsemix.config import ConfigError
from sparsemix.settings import RunConfig

# Fewer steps are mostly warm-up.
MIN_STEPS = 50
SMALLEST_WIDTH = 8
# Training tokens per multiply-add of a token's forward pass (which is near the parameters that a token uses) at the
# loss-optimal size: 22 at 3e11 FLOPs and 21 at 5e10, where it was measured (docs/isoflop.md).
TOKENS_PER_MAC = 22.0
# Sizes that a parabola is put through.
FITTED = 5

Size = int | str


class Rung(NamedTuple):
    """One size of an arm: a width or a name, and its cost. forward_flops: of a token."""

    size: Size
    forward_flops: float
    params: int
    step_flops: float
    step_tokens: int

    def steps(self, budget: float) -> int:
        return int(budget / self.step_flops)

    def tokens(self, budget: float) -> int:
        return self.steps(budget) * self.step_tokens


class Bottom(NamedTuple):
    """The least loss over sizes. side: -1 or 1 if it may lie beyond the smallest or the largest size, else 0."""

    forward_flops: float
    side: int


def rung(size: Size, config: RunConfig) -> Rung:
    """The cost of a run's settings; builds no model."""
    cost, seq_len = config.model.cost(), config.model.seq_len
    return Rung(size, cost.flops / seq_len, cost.params, config.step_flops, config.batch_size * seq_len)


def widths() -> Iterator[int]:
    """8, 12, 16, 24, 32, 48, 64, 96, 128, ...: one list for every kind and budget, so that they share widths. Heads of
    even width can be made of them. Five neighbours span about eight-fold in FLOPs, so that the curve rises at its ends
    by more than the 0.03 nats by which seeds of small models differ."""
    width = SMALLEST_WIDTH
    while True:
        yield from (width, width * 3 // 2)
        width *= 2


def predicted(budget: float, ratio: float = TOKENS_PER_MAC) -> float:
    """F = sqrt(2 C / 3 ratio), the size at which D = C / 3F is `ratio` times its F / 2 multiply-adds."""
    return sqrt(2 * budget / (3 * ratio))


def ratio_of(budget: float, forward_flops: float) -> float:
    """Training tokens per forward multiply-add of a size: the inverse of `predicted`."""
    return 2 * budget / (3 * forward_flops**2)


def trainable(rungs: Sequence[Rung], budget: float) -> list[Rung]:
    """The sizes of which the budget pays for enough steps, by their FLOPs."""
    return sorted((r for r in rungs if r.steps(budget) >= MIN_STEPS), key=lambda r: r.forward_flops)


def least_budget(rungs: Sequence[Rung], num_sizes: int) -> float | None:
    """The budget that pays for enough steps at so many sizes, or None where there are fewer."""
    costs = sorted(r.step_flops for r in rungs)
    return costs[num_sizes - 1] * MIN_STEPS if len(costs) >= num_sizes else None


def too_small(rungs: Sequence[Rung], budget: float, num_sizes: int) -> ConfigError:
    """What is wrong with a budget that pays for enough steps at fewer sizes."""
    least = least_budget(rungs, num_sizes)
    works = f", as {least * 1.005:.3g} does" if least else ""
    return ConfigError(
        f"budgets={budget:.3g} must pay for {MIN_STEPS} steps at {num_sizes} sizes{works}; raise it, or lower "
        "train.batch_tokens or the sizes"
    )


def ladder(rungs: Sequence[Rung], budget: float, ratio: float, num_sizes: int) -> list[Rung]:
    """The `num_sizes` neighbours around the predicted optimum. Raises ConfigError if the budget pays for fewer."""
    able = trainable(rungs, budget)
    if len(able) < num_sizes:
        raise too_small(rungs, budget, num_sizes)
    target = log(predicted(budget, ratio))
    nearest = min(range(len(able)), key=lambda i: abs(log(able[i].forward_flops) - target))
    first = min(max(0, nearest - num_sizes // 2), len(able) - num_sizes)
    return able[first : first + num_sizes]


def bottom(losses: Mapping[float, float]) -> Bottom:
    """Of forward FLOPs -> loss: the vertex of a parabola in log FLOPs through the five sizes around the best, if it
    opens upwards and two or more sizes lie on each side of it, which is what the report's fit asks for too; else the
    best size and the side on which the loss is lower."""
    flops = sorted(losses)
    x, y = np.log(flops), np.array([losses[f] for f in flops])
    best, last = int(y.argmin()), len(flops) - 1
    lower = -1 if y[0] <= y[-1] else 1
    if len(flops) < FITTED:
        return Bottom(flops[best], lower)
    first = min(max(0, best - FITTED // 2), len(flops) - FITTED)
    near = slice(first, first + FITTED)
    curvature, slope, _ = np.polyfit(x[near] - x[best], y[near], 2)
    if curvature <= 0:
        return Bottom(flops[best], -1 if best == 0 else 1 if best == last else lower)
    vertex = x[best] - slope / (2 * curvature)
    if best in (0, last) or not x[1] <= vertex <= x[last - 1]:
        return Bottom(flops[best], -1 if best == 0 or (best != last and vertex < x[1]) else 1)
    return Bottom(float(np.exp(vertex)), 0)


def extension(rungs: Sequence[Rung], tried: Sequence[Rung], budget: float, side: int) -> Rung | None:
    """The neighbour beyond the ladder's end on a side; None where the budget or the list of sizes ends, unless the
    ladder has too few sizes for a curve: then its other neighbour."""
    flops, able = [r.forward_flops for r in tried], trainable(rungs, budget)
    below = next((r for r in reversed(able) if r.forward_flops < min(flops)), None)
    above = next((r for r in able if r.forward_flops > max(flops)), None)
    wanted, other = (below, above) if side < 0 else (above, below)
    return wanted if wanted is not None or len(tried) >= FITTED else other
