"""A looked-up table's gradient, spelled as a scatter of all picks."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def table_grad(
    coef: Float[Tensor, "N R"], ids: Int[Tensor, "N R"], vec: Float[Tensor, "N D"], num_rows: int
) -> Float[Tensor, "M D"]:
    """G[m] = sum over picks (n, r) with ids_nr = m of coef_nr * vec_n."""
    picks = torch.einsum("nr,nd->nrd", coef, vec).flatten(0, 1)
    return vec.new_zeros(num_rows, vec.shape[1]).index_add_(0, ids.flatten(), picks)
