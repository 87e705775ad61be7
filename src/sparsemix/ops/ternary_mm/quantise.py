"""BitNet b1.58's integers: how weights and rows become codes and scales.

Convention: a scale multiplies, x is about codes * scale (some files store its inverse). Codes and scales are computed
in at least fp32, rounding is half to even. A matrix or row that holds NaN or an infinity gets a scale that is not
finite, so that its products are NaN: a broken value is seen, never hidden.
Source: arXiv:2402.17764, section 2."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from sparsemix.ops.precision import at_least_fp32

SMALLEST = 1e-5
LARGEST = 127


def ternary_values(weight: Float[Tensor, "*E F D"]) -> tuple[Float[Tensor, "*E F D"], Float[Tensor, "*E"]]:
    """codes = clamp(round(W / scale), -1, 1) as floats, scale = max(mean |W|, 1e-5): one scale a matrix (F, D), never
    one over a stack of them."""
    weight = at_least_fp32(weight)
    scale = weight.abs().mean(dim=(-2, -1)).clamp_min(SMALLEST)
    return (weight / scale[..., None, None]).round().clamp(-1, 1), scale


def int8_row_values(x: Float[Tensor, "*B D"]) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B 1"]]:
    """codes = round(x 127 / m) as floats, scale = m / 127, where m = max(max |x|, 1e-5) of the row. Symmetric, so
    -128 never occurs."""
    x = at_least_fp32(x)
    # A row of no numbers has no largest one.
    largest = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    largest = largest.clamp_min(SMALLEST)
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
