"""Weighted sums of looked-up table rows, spelled as a gather."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def row_mix(coef: Float[Tensor, "N R"], ids: Int[Tensor, "N R"], table: Float[Tensor, "M D"]) -> Float[Tensor, "N D"]:
    """y_n = sum_r coef_nr table[ids_nr]."""
    return torch.einsum("nr,nrd->nd", coef, table[ids])
