"""torch.func: its transforms see through PyTorch's own operations only, so under one the readable forms run."""

import torch
from torch import Tensor


def transformed() -> bool:
    """Is a transform of torch.func (grad, vjp, jacrev, vmap, ...) under way?"""
    # A compiler has its own way with transforms, and cannot trace the question.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def check_sizes(counts: Tensor) -> None:
    """Raises ValueError where vmap hides how many rows each expert has."""
    try:
        counts.tolist()
    except RuntimeError:
        raise ValueError(
            "torch.func.vmap cannot run experts: how many rows each of them gets differs from example to example; "
            "loop over the examples instead"
        ) from None
