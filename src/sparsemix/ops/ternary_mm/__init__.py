"""BitNet b1.58's integers: ternary weights, int8 rows, and their exact product.

Convention: a scale multiplies, x is about codes * scale (some files store its inverse). Codes and scales are computed
in at least fp32, rounding is half to even. A matrix or row that holds NaN or an infinity gets a scale that is not
finite, so that its products are NaN: a broken value is seen, never hidden.
Source: arXiv:2402.17764, section 2."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int, Int8, Int32
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops.grouped_mm import rows_run

int_mm = torch.ops.aten._int_mm.default
SMALLEST = 1e-5
LARGEST = 127
# Sums of so many products of a row code and a weight code stay below 2^24, where fp32 is exact.
EXACT_IN_FP32 = 2**24 // LARGEST


def ternary_values(weight: Float[Tensor, "*E F D"]) -> tuple[Float[Tensor, "*E F D"], Float[Tensor, "*E"]]:
    """codes = clamp(round(W / scale), -1, 1) as floats, scale = max(mean |W|, 1e-5): one scale a matrix (F, D), never
    one over a stack of them."""
    weight = _exact(weight)
    scale = weight.abs().mean(dim=(-2, -1)).clamp_min(SMALLEST)
    return (weight / scale[..., None, None]).round().clamp(-1, 1), scale


def int8_row_values(x: Float[Tensor, "*B D"]) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B 1"]]:
    """codes = round(x 127 / m) as floats, scale = m / 127, where m = max(max |x|, 1e-5) of the row. Symmetric, so
    -128 never occurs."""
    x = _exact(x)
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST)
    # An infinite row would divide by infinity and look like zeros.
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    return (x * (LARGEST / largest)).round().clamp(-LARGEST, LARGEST), largest / LARGEST


def ternary(weight: Float[Tensor, "*E F D"]) -> tuple[Int8[Tensor, "*E F D"], Float[Tensor, "*E"]]:
    """`ternary_values` with codes in int8; the code of a NaN is 0, its scale is not finite."""
    codes, scale = ternary_values(weight)
    return codes.nan_to_num(0.0).to(torch.int8), scale


def int8_rows(x: Float[Tensor, "*B D"]) -> tuple[Int8[Tensor, "*B D"], Float[Tensor, "*B 1"]]:
    """`int8_row_values` with codes in int8; the codes of a row that is not finite are 0, its scale NaN."""
    codes, scale = int8_row_values(x)
    return codes.nan_to_num(0.0).to(torch.int8), scale


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def ternary_mm(row_codes: Int8[Tensor, "N D"], weight_codes: Int8[Tensor, "F D"]) -> Int32[Tensor, "N F"]:
    """row_codes weight_codes^T, exact for row codes in [-127, 127], weight codes in {-1, 0, 1}, D below 2^31 / 127."""
    return torch.ops.sparsemix.ternary_mm(row_codes, weight_codes)


def ternary_grouped_mm(
    row_codes: Int8[Tensor, "R D"], weight_codes: Int8[Tensor, "E F D"], counts: Int[Tensor, " E"]
) -> Int32[Tensor, "R F"]:
    """out_r = weight_codes[e(r)] row_codes_r; rows are sorted by expert and counts says how many each has. Rows after
    the last expert's belong to none: they cost nothing and give 0."""
    return torch.ops.sparsemix.ternary_grouped_mm(row_codes, weight_codes, counts)


@torch.library.custom_op("sparsemix::ternary_mm", mutates_args=())
def _mm(row_codes: Tensor, weight_codes: Tensor) -> Tensor:
    if row_codes.numel() and weight_codes.numel() and _int_mm_serves(row_codes, weight_codes):
        # The weight stays (F, D): a single row against a contiguous (D, F) is several times slower on CPU.
        return int_mm(row_codes, weight_codes.mT)
    return float_product(row_codes, weight_codes)


@torch.library.custom_op("sparsemix::ternary_grouped_mm", mutates_args=())
def _grouped(row_codes: Tensor, weight_codes: Tensor, counts: Tensor) -> Tensor:
    out = row_codes.new_empty(row_codes.shape[0], weight_codes.shape[1], dtype=torch.int32)
    start = 0
    for e, count in enumerate(counts.tolist()):
        if count:
            out[start : start + count] = _mm(row_codes[start : start + count], weight_codes[e])
        start += count
    out[start:] = 0
    return out


def float_product(row_codes: Tensor, weight_codes: Tensor, most: int = EXACT_IN_FP32) -> Tensor:
    """The product through fp32, in stretches of at most `most` inputs, each of which is exact."""
    total = row_codes.new_zeros(row_codes.shape[0], weight_codes.shape[0], dtype=torch.int32)
    for rows, weight in zip(row_codes.split(most, 1), weight_codes.split(most, 1), strict=True):
        total += (rows.float() @ weight.float().mT).to(torch.int32)
    return total


def _int_mm_serves(row_codes: Tensor, weight_codes: Tensor) -> bool:
    if row_codes.device.type == "cuda":
        # What cuBLAS takes.
        return row_codes.shape[0] > 16 and row_codes.shape[1] % 8 == 0 and weight_codes.shape[0] % 8 == 0
    return row_codes.device.type == "cpu" and int_mm_is_exact_here()


@lru_cache(maxsize=1)
def int_mm_is_exact_here() -> bool:
    """Does torch's int8 product on this processor neither saturate nor wrap? Builds for processors without VNNI did
    (pytorch issue 136746)."""
    rows = torch.tensor([[LARGEST], [-LARGEST], [1]], dtype=torch.int8).repeat(1, 4096)
    weight = torch.tensor([[1], [-1], [0]], dtype=torch.int8).repeat(1, 4096)
    return torch.equal(int_mm(rows, weight.mT), float_product(rows, weight))


@_mm.register_fake
def _(row_codes: Tensor, weight_codes: Tensor) -> Tensor:
    return row_codes.new_empty(row_codes.shape[0], weight_codes.shape[0], dtype=torch.int32)


@_grouped.register_fake
def _(row_codes: Tensor, weight_codes: Tensor, counts: Tensor) -> Tensor:
    return row_codes.new_empty(row_codes.shape[0], weight_codes.shape[1], dtype=torch.int32)


@register_flop_formula(torch.ops.sparsemix.ternary_mm)
def _flops(rows_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * rows_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.sparsemix.ternary_grouped_mm, get_raw=True)
def _grouped_flops(row_codes: Tensor, weight_codes: Tensor, counts: Tensor, *args, **kwargs) -> int:
    return 2 * rows_run(row_codes, counts) * weight_codes.shape[1] * weight_codes.shape[2]
