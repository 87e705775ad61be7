"""One optimizer over dense parameters, expert stacks and looked-up tables; its groups, schedule and clipping groups."""

from sparsemix.optim.groups import Matrices, Moment, clip_groups, decays
from sparsemix.optim.optimizer import Optimizer, build_optimizer
from sparsemix.optim.rates import ONE_RATE, Rates
from sparsemix.optim.schedule import Schedule, schedule, second_stage

__all__ = [
    "ONE_RATE",
    "Matrices",
    "Moment",
    "Optimizer",
    "Rates",
    "Schedule",
    "build_optimizer",
    "clip_groups",
    "decays",
    "schedule",
    "second_stage",
]
