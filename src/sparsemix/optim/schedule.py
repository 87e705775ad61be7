"""The learning rate over a run."""

import math
from typing import Literal

Schedule = Literal["cosine", "two_stage"]
# Second peak over first: 1e-3 after 1.5e-3 for the smallest model of arXiv:2411.04965, appendix (0.53 for its 3B).
SECOND_PEAK = 2 / 3


def schedule(step: float, steps: int, warmup: int, floor: float = 0.1, shape: Schedule = "cosine") -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then a cosine that ends at `floor` after the last, or
    the two stages of BitNet b1.58: a straight line to `floor`, times 2/3 from half of the run on.

    The sources give the peaks of the two stages (arXiv:2411.04965), not the line between; one line for both is the
    reading in which the second stage starts with a drop."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if shape == "two_stage":
        return (SECOND_PEAK if second_stage(step, steps) else 1.0) * (1 - (1 - floor) * progress)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def second_stage(step: float, steps: int) -> bool:
    """Is `step` in the second half of the run? There the recipe of two stages has no weight decay."""
    # The step may be a sum of FLOPs, a little short of a whole number.
    return 2 * step >= steps - 1e-6
