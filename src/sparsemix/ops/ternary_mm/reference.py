"""Ternary weights and int8 rows, number by number."""

import torch
from jaxtyping import Float, Int, Int8, Int32
from torch import Tensor


def ternary(weight: Float[Tensor, "F D"]) -> tuple[Int8[Tensor, "F D"], float]:
    """clamp(round(w / scale), -1, 1), scale = max(mean |W|, 1e-5)."""
    numbers = weight.flatten().tolist()
    scale = max(sum(map(abs, numbers)) / len(numbers), 1e-5)
    codes = [min(1, max(-1, round(w / scale))) for w in numbers]
    return torch.tensor(codes, dtype=torch.int8).view_as(weight), scale


def int8_rows(x: Float[Tensor, "N D"]) -> tuple[Int8[Tensor, "N D"], list[float]]:
    """round(x 127 / m), scale = m / 127, m = max(max |x|, 1e-5) of the row."""
    codes, scales = torch.empty(x.shape, dtype=torch.int8), []
    for n, row in enumerate(x.tolist()):
        m = max(*map(abs, row), 1e-5)
        codes[n] = torch.tensor([round(v * (127 / m)) for v in row], dtype=codes.dtype)
        scales.append(m / 127)
    return codes, scales


def ternary_mm(row_codes: Int8[Tensor, "N D"], weight_codes: Int8[Tensor, "F D"]) -> Int32[Tensor, "N F"]:
    """out_nf = sum_d row_nd weight_fd, in 64-bit integers."""
    return (row_codes.long() @ weight_codes.long().mT).to(torch.int32)


def ternary_grouped_mm(
    row_codes: Int8[Tensor, "R D"], weight_codes: Int8[Tensor, "E F D"], counts: Int[Tensor, " E"]
) -> Int32[Tensor, "R F"]:
    """One expert at a time: the first counts[0] rows belong to expert 0, and so on; 0 for rows of none."""
    *pieces, rest = row_codes.split([*counts.tolist(), len(row_codes) - int(counts.sum())])
    products = [ternary_mm(piece, weight_codes[e]) for e, piece in enumerate(pieces)]
    return torch.cat([*products, torch.zeros(len(rest), weight_codes.shape[1], dtype=torch.int32)])
