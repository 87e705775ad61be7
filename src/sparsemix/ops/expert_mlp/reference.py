"""Feed-forward experts on picked tokens, one expert at a time."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

ACTS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def expert_mlp(
    tokens: Float[Tensor, "N D"],
    token_ids: Int[Tensor, " R"],
    gates: Float[Tensor, " R"],
    counts: Int[Tensor, " E"],
    first: Float[Tensor, "E M D"],
    down: Float[Tensor, "E D F"],
    act: str,
) -> Float[Tensor, "N D"]:
    """y_n = sum over the picks r with token_ids_r = n of gates_r down_e(r) hidden_r, hidden_r = act(first_e(r) x_n),
    or act(gate) * up with (gate, up) = first_e(r) x_n where first has 2 F rows."""
    y, start = torch.zeros_like(tokens), 0
    for e, count in enumerate(counts.tolist()):
        picked = slice(start, start + count)
        pre = tokens[token_ids[picked]] @ first[e].mT
        gate, *up = pre.split(down.shape[2], dim=-1)
        hidden = ACTS[act](gate) * up[0] if up else ACTS[act](gate)
        rows = gates[picked, None] * (hidden @ down[e].mT)
        y = y.index_add(0, token_ids[picked], rows.to(y.dtype))
        start += count
    return y
