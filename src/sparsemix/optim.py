"""AdamW with parameter groups by rule, and the learning-rate schedule."""

import math
from typing import Literal

import torch
from torch import nn

from sparsemix.layers.block import RMSNorm
from sparsemix.layers.peer import PEER
from sparsemix.layers.pkm import PKM
from sparsemix.layers.query_norm import QueryNorm


def decays(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Weight decay reaches matrices only: not norms, biases, embeddings, product keys or their tables."""
    if isinstance(module, (nn.Embedding, RMSNorm, QueryNorm, PEER, PKM)):
        return False
    if name == "sub_norm":  # an expert bank's norms, stacked
        return False
    return parameter.ndim >= 2


def build_optimizer(
    module: nn.Module, lr: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of `module`, in two groups: decayed and not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                groups[decays(owner, name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=betas,
        eps=1e-8,
        fused=True,
    )


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


def clip_groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """The trunk's parameters, and the predictors' apart: a predictor must not change the trunk's clipping."""
    trunk: list[nn.Parameter] = []
    predictors: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (predictors if "predictor" in name.split(".") else trunk).append(parameter)
    return [group for group in (trunk, predictors) if group]
