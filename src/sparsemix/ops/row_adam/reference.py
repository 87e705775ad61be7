"""AdamW's equation, for whole rows."""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from sparsemix.ops.row_adam import Rates


def adamw(
    w: Float[Tensor, "U D"],
    m: Float[Tensor, "U D"],
    v: Float[Tensor, "U D"] | Float[Tensor, " U"],
    g: Float[Tensor, "U D"],
    rates: "Rates",
    keep: Float[Tensor, "U 1"] | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2,
    w' = keep w - lr m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps).

    Where v is one number a row, the row's mean of g^2 stands in for g^2. `keep` is what weight decay leaves of w.
    Source: arXiv:1711.05101, algorithm 2."""
    b1, b2 = rates.betas
    g = g.to(m.dtype)
    squares = g.square() if v.ndim == 2 else g.square().mean(dim=1)
    m, v = m.lerp(g, 1 - b1), v * b2 + squares * (1 - b2)
    spread = v.sqrt() * rates.root + rates.eps
    return keep * w.to(m.dtype) - rates.rate * m / (spread if v.ndim == 2 else spread[:, None]), m, v
