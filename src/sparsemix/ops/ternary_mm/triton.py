"""The int32 product on a GPU: packed bytes are unpacked in registers and go to the tensor cores as int8."""

import torch
import triton
import triton.language as tl
from jaxtyping import Int, Int8, Int32, UInt8
from torch import Tensor


@triton.jit
def _product(rows, packed, experts, starts, ends, out, N, D, F, P: tl.constexpr,
             GROUPED: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    if GROUPED:
        e, start, end = tl.load(experts + tile), tl.load(starts + tile), tl.load(ends + tile)
    else:
        e, start, end = tile * 0, tile * BN, tile * 0 + N
    n = start + tl.arange(0, BN)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    sums = tl.zeros((BN, BF), dtype=tl.int32)
    for first in range(0, P, BP):
        j = first + tl.arange(0, BP)
        there = (j < P)[:, None] & (f < F)[None, :]
        weight = tl.load(packed + (e * F + f)[None, :] * P + j[:, None], mask=there, other=0)  # (BP, BF)
        for q in tl.static_range(4):
            d = q * P + j
            there = (n < end)[:, None] & ((j < P) & (d < D))[None, :]
            x = tl.load(rows + n[:, None] * D + d[None, :], mask=there, other=0)  # (BN, BP)
            codes = ((weight >> (2 * q)) & 3).to(tl.int8) - 1
            sums = tl.dot(x, codes, sums, out_dtype=tl.int32)
    tl.store(out + n[:, None] * F + f[None, :], sums, mask=(n < end)[:, None] & (f < F)[None, :])


def ternary_sums(
    row_codes: Int8[Tensor, "N D"], packed: UInt8[Tensor, "*E F P"], counts: Int[Tensor, " E"] | None
) -> Int32[Tensor, "N F"]:
    """row_codes W^T, or with `counts` the rows of every expert times its own W, without asking the GPU for a number."""
    (N, D), (F, P) = row_codes.shape, packed.shape[-2:]
    out = row_codes.new_zeros(N, F, dtype=torch.int32)
    if not out.numel():
        return out
    # Decoding: the rows fill one tensor core tile, and many narrow stripes of the weights keep every core reading.
    num_experts = 1 if counts is None else len(counts)
    BN, BF, BP = (64, 64, 64) if 16 * num_experts < N else (16, 16, 128)
    if counts is None:
        experts, starts, ends, num_tiles = row_codes, row_codes, row_codes, triton.cdiv(N, BN)
    else:
        experts, starts, ends = _tiles(counts, N, BN)
        num_tiles = len(experts)
    operands = (row_codes.contiguous(), packed.contiguous(), experts, starts, ends, out)
    sizes = (N, D, F, P, counts is not None, BN, BF, BP)
    _product[(num_tiles, triton.cdiv(F, BF))](*operands, *sizes)  # pyright: ignore[reportArgumentType]
    return out


def _tiles(counts: Int[Tensor, " E"], num_rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert, first row and end of its rows, for as many tiles of `size` rows as there may be; tiles that nobody needs
    have no row."""
    counts = counts.long()
    tiles, row_ends = (counts + size - 1) // size, counts.cumsum(0)
    tile_ends = tiles.cumsum(0)
    tile = torch.arange(min(num_rows, num_rows // size + len(counts)), dtype=torch.long, device=counts.device)
    needed = tile < tile_ends[-1]
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp_max(len(counts) - 1)
    before = (tile - (tile_ends - tiles)[expert]) * size
    start = (row_ends - counts)[expert] + before
    return expert, torch.where(needed, start, 0), torch.where(needed, row_ends[expert], 0)
