"""The number type of what must not be rounded to bf16."""

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_fp32(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """x in fp32, or in fp64 if it is fp64 already: bf16 scores tie and so pick other experts."""
    return x if x.dtype == torch.float64 else x.float()
