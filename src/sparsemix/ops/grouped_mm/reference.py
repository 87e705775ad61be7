"""The grouped product, one expert at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def grouped_mm(
    rows: Float[Tensor, "R D"], weight: Float[Tensor, "E F D"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R F"]:
    """out_r = weight[e(r)] row_r, where the first counts[0] rows belong to expert 0, and so on; 0 for rows of none."""
    *pieces, rest = rows.split([*counts.tolist(), len(rows) - int(counts.sum())])
    products = [piece @ weight[e].mT for e, piece in enumerate(pieces)]
    return torch.cat([*products, rows.new_zeros(len(rest), weight.shape[1])])
