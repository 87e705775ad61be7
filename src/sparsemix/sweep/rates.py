"""Learning rates by trial: a sweep by factors of two on validation, extended until the best is interior."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, log2

import numpy as np

STEP = 2.0
MAX_RATES = 7
# Steps from the best rate within which losses shape the parabola.
NEAR = 2

# (name, rate) of every run to make -> their validation losses, infinite where a run failed.
Train = Callable[[Sequence[tuple[str, float]]], Sequence[float]]


def sweep(centres: Mapping[str, float], train: Train) -> dict[str, dict[float, float]]:
    """Of every name: rate -> validation loss. Rates around its centre, doubled or halved until its best is interior or
    seven were tried."""
    tried: dict[str, dict[float, float]] = {name: {} for name in centres}
    todo = [(name, centre * STEP**i) for name, centre in centres.items() for i in (-1, 0, 1)]
    while todo:
        for (name, rate), loss in zip(todo, train(todo), strict=True):
            tried[name][rate] = loss
        todo = [
            (name, best(losses) * (STEP if best(losses) == max(losses) else 1 / STEP))
            for name, losses in tried.items()
            if len(losses) < MAX_RATES and not interior(losses)
        ]
    return tried


def best(losses: Mapping[float, float]) -> float:
    """The rate with the least loss."""
    return min(losses, key=losses.__getitem__)


def vertex(losses: Mapping[float, float]) -> float:
    """The lowest point of a parabola in the logarithm of the rate through the losses around the best, to half a step;
    the best itself where they bend to none.

    One seed's noise moves the best of a flat valley by a step or two, and most harm comes from too large a rate: other
    sizes may bear less. The parabola leans away from the steep side."""
    lowest = best(losses)
    near = {log2(rate / lowest): loss for rate, loss in losses.items() if isfinite(loss)}
    near = {x: loss for x, loss in near.items() if abs(x) <= NEAR + 0.01}
    if len(near) < 3 or not interior(losses):
        return lowest
    curvature, slope, _ = np.polyfit(list(near), list(near.values()), 2)
    if curvature <= 0:
        return lowest
    at = np.clip(-slope / (2 * curvature), min(near), max(near))
    return lowest * float(STEP ** (round(2 * at) / 2))


def interior(losses: Mapping[float, float]) -> bool:
    """Whether the best rate has worse ones on both sides."""
    return min(losses) < best(losses) < max(losses)


def described(losses: Mapping[float, float], chosen: float | None = None) -> str:
    """'0.01 of 0.005, 0.01, 0.02', and what there is to say against it; chosen: the rate, if not the best."""
    text = f"{best(losses) if chosen is None else chosen:.3g} of {', '.join(f'{rate:.3g}' for rate in sorted(losses))}"
    if not isfinite(losses[best(losses)]):
        return f"{text} (every run failed)"
    return text if interior(losses) else f"{text} (the best is at an end)"
