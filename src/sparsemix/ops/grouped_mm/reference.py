"""The grouped product and its weight gradient, one expert at a time."""

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


def weight_grad(
    grad: Float[Tensor, "R F"], rows: Float[Tensor, "R D"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "E F D"]:
    """dW_e = sum over the rows r of expert e of grad_r row_r^T."""
    ends = counts.cumsum(0)
    return torch.stack([grad[end - n : end].mT @ rows[end - n : end] for n, end in zip(counts, ends, strict=True)])
