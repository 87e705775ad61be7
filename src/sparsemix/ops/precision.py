"""Which number type: what must not be rounded to bf16, and what autocast casts."""

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_fp32(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """x in fp32, or in fp64 if it is fp64 already: bf16 scores tie and so pick other experts."""
    return x if x.dtype == torch.float64 else x.float()


def autocast(*operands: Float[Tensor, "..."]) -> tuple[Tensor, ...]:
    """The operands of a matrix product in the number type that autocast gives them, as they are outside of it.

    As in PyTorch's own products fp64 stays."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in operands)
