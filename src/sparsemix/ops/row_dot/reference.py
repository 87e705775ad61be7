"""Inner products with looked-up table rows, spelled as a gather."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def row_dot(x: Float[Tensor, "N D"], ids: Int[Tensor, "N R"], table: Float[Tensor, "M D"]) -> Float[Tensor, "N R"]:
    """z_nr = <x_n, table[ids_nr]>."""
    return torch.einsum("nd,nrd->nr", x, table[ids])
