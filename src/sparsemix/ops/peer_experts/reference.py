"""Single-neuron experts that were looked up for each token, spelled as gathers."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def peer_experts(
    x: Float[Tensor, "N D"],
    ids: Int[Tensor, "N R"],
    gates: Float[Tensor, "N R"],
    w_in: Float[Tensor, "M D"],
    w_out: Float[Tensor, "M D"],
    activation: str,
) -> Float[Tensor, "N D"]:
    """y_n = sum_r gates_nr act(<x_n, w_in[ids_nr]>) w_out[ids_nr]."""
    hidden = ACTIVATIONS[activation](torch.einsum("nd,nrd->nr", x, w_in[ids]))
    return torch.einsum("nr,nrd->nd", gates.to(hidden.dtype) * hidden, w_out[ids])
