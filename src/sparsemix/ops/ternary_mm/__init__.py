"""int8 rows times ternary weights of two bits, exact in int32, and the same from floats to floats.

Convention: weights are codes in {-1, 0, 1} packed by `pack_rows` (pack.py), rows are codes in [-127, 127]; a scale
multiplies (quantise.py)."""

from pathlib import Path

import torch
from jaxtyping import Float, Int, Int8, Int32, UInt8
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops.grouped_mm import rows_run
from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.ternary_mm import reference
from sparsemix.ops.ternary_mm.pack import unpack_rows
from sparsemix.ops.ternary_mm.quantise import int8_row_values, int8_rows, ternary, ternary_values
from sparsemix.ops.ternary_mm.unpacked import unpacked_mm

__all__ = [
    "experts_of",
    "int8_row_values",
    "int8_rows",
    "quantised_grouped_mm",
    "quantised_mm",
    "spread",
    "ternary",
    "ternary_grouped_mm",
    "ternary_mm",
    "ternary_values",
]

SOURCE = Path(__file__).with_name("native.c")
KERNELS = Kernels("ternary_mm", SOURCE, triton=True, dtypes=(torch.int8, torch.float32, torch.bfloat16))


def ternary_mm(
    row_codes: Int8[Tensor, "N D"], packed: UInt8[Tensor, "F P"], impl: str = "auto"
) -> Int32[Tensor, "N F"]:
    """row_codes W^T, exact for row codes in [-127, 127] and D below 2^31 / 127. The codes of W are packed by
    `pack_rows`, P = ceil(D / 4)."""
    return torch.ops.sparsemix.ternary_mm(row_codes, packed, None, impl)


def ternary_grouped_mm(
    row_codes: Int8[Tensor, "R D"], packed: UInt8[Tensor, "E F P"], counts: Int[Tensor, " E"], impl: str = "auto"
) -> Int32[Tensor, "R F"]:
    """out_r = W_e(r) row_codes_r; rows are sorted by expert and counts says how many each has. Rows after the last
    expert's belong to none: they cost nothing and give 0."""
    return torch.ops.sparsemix.ternary_mm(row_codes, packed, counts, impl)


def quantised_mm(
    x: Float[Tensor, "N D"], packed: UInt8[Tensor, "F P"], scale: Float[Tensor, " M"], impl: str = "auto"
) -> Float[Tensor, "N F"]:
    """(codes of x) W^T * (scale of the row * scale of W), in x's dtype: `int8_rows`, `ternary_mm` and the scales in
    one call, bit for bit. M matrices lie one after the other in F, each with its own scale. Not differentiable."""
    return torch.ops.sparsemix.quantised_mm(x, packed, scale, None, impl)


def quantised_grouped_mm(
    x: Float[Tensor, "R D"],
    packed: UInt8[Tensor, "E F P"],
    scale: Float[Tensor, "E M"],
    counts: Int[Tensor, " E"],
    impl: str = "auto",
) -> Float[Tensor, "R F"]:
    """The same for rows sorted by expert, each expert with its own M matrices; rows of no expert give 0."""
    return torch.ops.sparsemix.quantised_mm(x, packed, scale, counts, impl)


# Defined by schema: decoding a token calls these for every matrix, and custom_op's wrapper would cost as much as a
# small product.
torch.library.define("sparsemix::ternary_mm", "(Tensor row_codes, Tensor packed, Tensor? counts, str impl) -> Tensor")
torch.library.define(
    "sparsemix::quantised_mm", "(Tensor x, Tensor packed, Tensor scale, Tensor? counts, str impl) -> Tensor"
)


def _sums(row_codes: Tensor, packed: Tensor, counts: Tensor | None, impl: str) -> Tensor:
    _check(row_codes, packed)
    if counts is None:
        check_op("ternary_mm", row_codes, packed)
    else:
        check_op("ternary_grouped_mm", row_codes, packed, counts)
        counts = counts.long().contiguous()
    picked = KERNELS.pick(impl, row_codes)
    if picked == "native":
        out = row_codes.new_empty(row_codes.shape[0], packed.shape[-2], dtype=torch.int32)
        rows, weight, sizes = row_codes.contiguous(), packed.contiguous(), _sizes(row_codes, packed)
        KERNELS.call("ternary_sums", rows, weight, counts, _scratch(rows), out, *sizes)
        return out
    if picked == "triton":
        from sparsemix.ops.ternary_mm import triton

        return triton.ternary_sums(row_codes, packed, counts)
    if picked == "torch":
        return unpacked_mm(row_codes, packed, counts)
    codes = unpack_rows(packed, row_codes.shape[1])
    if counts is None:
        return reference.ternary_mm(row_codes, codes)
    return reference.ternary_grouped_mm(row_codes, codes, counts)


def _values(x: Tensor, packed: Tensor, scale: Tensor, counts: Tensor | None, impl: str) -> Tensor:
    _check(x, packed)
    if counts is None:
        check_op("quantised_mm", x, packed, scale)
    else:
        check_op("quantised_grouped_mm", x, packed, scale, counts)
        counts = counts.long().contiguous()
    _check_matrices(packed, scale)
    picked = KERNELS.pick(impl, x, refused="the scale is float64" if scale.dtype == torch.float64 else None)
    if picked == "native":
        out = x.new_empty(x.shape[0], packed.shape[-2])
        name = "ternary_values_bf16" if x.dtype == torch.bfloat16 else "ternary_values_f32"
        rows, weight, sizes = x.contiguous(), packed.contiguous(), (*_sizes(x, packed), scale.shape[-1])
        KERNELS.call(name, rows, weight, scale.float().contiguous(), counts, _scratch(x), out, *sizes)
        return out
    codes, row_scale = int8_rows(x.detach())
    sums = _sums(codes, packed, counts, impl)
    width = packed.shape[-2]
    if counts is None:
        return _times(sums, row_scale * scale.repeat_interleave(width // scale.shape[-1]), x.dtype)
    values = _times(sums, row_scale * spread(scale, counts, len(x), width), x.dtype)
    # A row of no expert gives 0, whatever it holds.
    return values.masked_fill_(torch.arange(len(x), dtype=torch.long, device=x.device)[:, None] >= counts.sum(), 0)


torch.library.impl("sparsemix::ternary_mm", "CompositeExplicitAutograd", _sums)
torch.library.impl("sparsemix::quantised_mm", "CompositeExplicitAutograd", _values)


def _check(rows: Tensor, packed: Tensor) -> None:
    """A kernel would read beyond a matrix of another width."""
    if rows.ndim == 2 and packed.ndim > 1 and packed.shape[-1] != -(-rows.shape[1] // 4):
        raise ValueError(f"{packed.shape[-1]} bytes a row do not hold D={rows.shape[1]} weights: pack with pack_rows")


def _times(sums: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (sums.to(scale.dtype) * scale).to(dtype)


def _check_matrices(packed: Tensor, scale: Tensor) -> None:
    F, M = packed.shape[-2], scale.shape[-1]
    if not M or F % M:
        raise RuntimeError(f"quantised_mm: scale of M={M} matrices, which must divide F={F} rows")


def _scratch(rows: Tensor) -> Tensor:
    """Room for the rows as the C kernel reads them: a header, and whole steps of each quarter."""
    return rows.new_empty(rows.shape[0] * (64 + 256 * -(-rows.shape[1] // 256)), dtype=torch.int8)


def _sizes(rows: Tensor, packed: Tensor) -> tuple[int, int, int, int]:
    """N, D, F, E."""
    N, D = rows.shape
    return N, D, packed.shape[-2], packed.shape[0] if packed.ndim == 3 else 1


def spread(scale: Float[Tensor, "E M"], counts: Int[Tensor, " E"], num_rows: int, width: int) -> Float[Tensor, "R F"]:
    """The scale of every output of every row: that of its expert and matrix."""
    return scale[experts_of(counts, num_rows)].repeat_interleave(width // scale.shape[1], dim=1)


def experts_of(counts: Int[Tensor, " E"], num_rows: int) -> Int[Tensor, " R"]:
    """The expert of every row, rows sorted by expert; rows past the last one's get the last one."""
    rows = torch.arange(num_rows, dtype=torch.long, device=counts.device)
    return torch.searchsorted(counts.cumsum(0), rows, right=True).clamp(max=len(counts) - 1)


@torch.library.register_fake("sparsemix::ternary_mm")
def _(row_codes: Tensor, packed: Tensor, counts: Tensor | None, impl: str) -> Tensor:
    return row_codes.new_empty(row_codes.shape[0], packed.shape[-2], dtype=torch.int32)


@torch.library.register_fake("sparsemix::quantised_mm")
def _(x: Tensor, packed: Tensor, scale: Tensor, counts: Tensor | None, impl: str) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[-2])


def _flops(rows: Tensor, packed: Tensor, counts: Tensor | None) -> int:
    run = rows.shape[0] if counts is None else rows_run(rows, counts)
    return 2 * run * rows.shape[1] * packed.shape[-2]


@register_flop_formula(torch.ops.sparsemix.ternary_mm, get_raw=True)
def _sums_flops(row_codes: Tensor, packed: Tensor, counts: Tensor | None, *args, **kwargs) -> int:
    return _flops(row_codes, packed, counts)


@register_flop_formula(torch.ops.sparsemix.quantised_mm, get_raw=True)
def _values_flops(x: Tensor, packed: Tensor, scale: Tensor, counts: Tensor | None, *args, **kwargs) -> int:
    return _flops(x, packed, counts)
