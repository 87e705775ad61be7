"""The product through PyTorch: packed weights are unpacked a stretch of rows at a time, so that memory stays small."""

from functools import lru_cache

import torch
from jaxtyping import Int8, Int32, UInt8
from torch import Tensor

from sparsemix.ops.ternary_mm.pack import unpack_rows

int_mm = torch.ops.aten._int_mm.default
LARGEST = 127
# Sums of so many products of a row code and a weight code stay below 2^24, where fp32 is exact.
EXACT_IN_FP32 = 2**24 // LARGEST
# Weights unpacked at a time: what fits into a processor's caches, and what keeps a GPU busy.
STRETCH = {"cpu": 2**20, "cuda": 2**26}


def unpacked_mm(row_codes: Int8[Tensor, "N D"], packed: UInt8[Tensor, "*E F P"], counts: Tensor | None) -> Tensor:
    """row_codes W^T, or with `counts` the rows of every expert times its own W; (N, F) int32."""
    out = row_codes.new_zeros(row_codes.shape[0], packed.shape[-2], dtype=torch.int32)
    num_rows = max(1, STRETCH.get(row_codes.device.type, 2**20) // max(1, row_codes.shape[1]))
    matrices, ends = (packed, counts.cumsum(0).tolist()) if counts is not None else (packed[None], [len(out)])
    for matrix, start, end in zip(matrices, [0, *ends], ends, strict=False):
        if start == end:
            continue
        for weight, into in zip(matrix.split(num_rows), out[start:end].split(num_rows, dim=1), strict=True):
            into.copy_(int8_mm(row_codes[start:end], unpack_rows(weight, row_codes.shape[1])))
    return out


def int8_mm(row_codes: Int8[Tensor, "N D"], weight_codes: Int8[Tensor, "F D"]) -> Int32[Tensor, "N F"]:
    """row_codes weight_codes^T, by the kernel that is exact here, and fast where there is a choice."""
    if row_codes.numel() and weight_codes.numel() and _int_mm_serves(row_codes, weight_codes):
        # The weight stays (F, D): a single row against a contiguous (D, F) is several times slower on CPU.
        return int_mm(_dense(row_codes), _dense(weight_codes).mT)
    return float_product(row_codes, weight_codes)


def float_product(row_codes: Tensor, weight_codes: Tensor, most: int = EXACT_IN_FP32) -> Tensor:
    """The product through fp32, in stretches of at most `most` inputs, each of which is exact."""
    total = row_codes.new_zeros(row_codes.shape[0], weight_codes.shape[0], dtype=torch.int32)
    for rows, weight in zip(row_codes.split(most, 1), weight_codes.split(most, 1), strict=True):
        total += (rows.float() @ weight.float().mT).to(torch.int32)
    return total


def _dense(codes: Tensor) -> Tensor:
    """The codes with the strides of their sizes: torch's product misreads others, as of a single row of an expanded
    tensor, which counts as contiguous."""
    return codes.contiguous().flatten().view(codes.shape)


def _int_mm_serves(row_codes: Tensor, weight_codes: Tensor) -> bool:
    # torch's product (2.13) leaves most of its result unwritten where the depth is one.
    if row_codes.shape[1] == 1:
        return False
    if row_codes.device.type == "cuda":
        # What cuBLAS takes.
        return row_codes.shape[0] > 16 and row_codes.shape[1] % 8 == 0 and weight_codes.shape[0] % 8 == 0
    # Without VNNI it is a plain loop, far slower than the fp32 product.
    return row_codes.device.type == "cpu" and torch.cpu._is_vnni_supported() and int_mm_is_exact_here()


@lru_cache(maxsize=1)
def int_mm_is_exact_here() -> bool:
    """Does torch's int8 product on this processor neither saturate nor wrap? Builds for processors without VNNI did
    (pytorch issue 136746)."""
    rows = torch.tensor([[LARGEST], [-LARGEST], [1]], dtype=torch.int8).repeat(1, 4096)
    weight = torch.tensor([[1], [-1], [0]], dtype=torch.int8).repeat(1, 4096)
    return torch.equal(int_mm(rows, weight.mT), float_product(rows, weight))
