"""Four ternary weights in a byte: the layout of the kernels, and the two that other programs read."""

import struct

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

# bitnet.cpp (x86) keeps the scale at the start of a block of this many bytes, after the codes.
TRAILER = 32


def pack_rows(codes: Int8[Tensor, "*E F D"]) -> UInt8[Tensor, "*E F P"]:
    """byte[f, j] holds the weights j, j + P, j + 2P, j + 3P of row f at bits 0-1, 2-3, 4-5, 6-7 as code + 1, where
    P = ceil(D / 4). Weights missing in the last quarter are zeros. In memory: a row is one stretch of bytes, and any
    number of neighbouring bytes unpacks to four stretches of neighbouring weights."""
    return pack_hf(codes.mT).mT.contiguous()


def unpack_rows(packed: UInt8[Tensor, "*E F P"], num_columns: int) -> Int8[Tensor, "*E F D"]:
    """The codes that `pack_rows` packed."""
    quarters = torch.cat([packed >> 2 * i & 3 for i in range(4)], dim=-1)
    return quarters[..., :num_columns].to(torch.int8).sub_(1)


def pack_hf(codes: Int8[Tensor, "*E F D"]) -> UInt8[Tensor, "*E f D"]:
    """byte[r, d] holds rows r, r + f, r + 2f, r + 3f at bits 0-1, 2-3, 4-5, 6-7 as code + 1, where f = ceil(F / 4).

    Rows missing in the last quarter are zeros. The layout of Hugging Face's BitNet where F is a multiple of 4."""
    F = codes.shape[-2]
    f = -(-F // 4)
    # Padding goes behind the rows, so that whole quarters stay whole.
    padded = torch.nn.functional.pad(codes, (0, 0, 0, 4 * f - F)) + 1
    quarters = padded.to(torch.uint8).unflatten(-2, (4, f))
    return sum((quarters.select(-3, i) << 2 * i for i in range(1, 4)), quarters.select(-3, 0))


def unpack_hf(packed: UInt8[Tensor, "*E f D"], num_rows: int) -> Int8[Tensor, "*E F D"]:
    """The codes that `pack_hf` packed. Raises ValueError if they do not fit `num_rows` or are none of -1, 0, 1."""
    if packed.shape[-2] != -(-num_rows // 4):
        raise ValueError(f"packed weights of {packed.shape[-2]} rows of bytes cannot hold num_rows={num_rows}")
    quarters = torch.stack([packed >> 2 * i & 3 for i in range(4)], dim=-3)
    return _codes(quarters.flatten(-3, -2)[..., :num_rows, :])


def hf_from_rows(packed: UInt8[Tensor, "*E F P"], num_columns: int) -> UInt8[Tensor, "*E f D"]:
    """What `pack_rows` packed, as `pack_hf` packs it. Unpacks one matrix at a time."""
    if packed.ndim > 2:
        return torch.stack([hf_from_rows(matrix, num_columns) for matrix in packed])
    return pack_hf(unpack_rows(packed, num_columns))


def rows_from_hf(packed: UInt8[Tensor, "*E f D"], num_rows: int) -> UInt8[Tensor, "*E F P"]:
    """What `pack_hf` packed, as `pack_rows` packs it. Raises ValueError as `unpack_hf` does."""
    if packed.ndim > 2:
        return torch.stack([rows_from_hf(matrix, num_rows) for matrix in packed])
    return pack_rows(unpack_hf(packed, num_rows))


def pack_i2_s(codes: Int8[Tensor, "F D"], scale: float) -> UInt8[Tensor, " n"]:
    """Each 128 weights (in row order) become 32 bytes: byte j holds weights j, j + 32, j + 64, j + 96 at bits 6-7,
    4-5, 2-3, 0-1 as code + 1; then 32 bytes that start with the scale (fp32, little endian, multiplies).

    bitnet.cpp's I2_S for x86. Raises ValueError unless the number of weights is a multiple of 128."""
    if codes.numel() % 128:
        raise ValueError(f"I2_S packs 128 weights at a time; {codes.numel()} is no multiple, pad the matrix")
    quarters = (codes + 1).to(torch.uint8).reshape(-1, 4, 32)
    packed = sum((quarters[:, i] << 6 - 2 * i for i in range(3)), quarters[:, 3])
    trailer = struct.pack("<f", scale).ljust(TRAILER, b"\0")
    return torch.cat([packed.flatten(), torch.frombuffer(bytearray(trailer), dtype=torch.uint8)])


def unpack_i2_s(packed: UInt8[Tensor, " n"], shape: tuple[int, int]) -> tuple[Int8[Tensor, "F D"], float]:
    """The codes and the scale that `pack_i2_s` packed. Raises ValueError where the bytes do not fit `shape`."""
    num_bytes = shape[0] * shape[1] // 4
    if shape[0] * shape[1] % 128 or len(packed) != num_bytes + TRAILER:
        raise ValueError(f"{len(packed)} bytes are no I2_S matrix of {shape[0]} x {shape[1]} weights")
    blocks = packed[:num_bytes].view(-1, 32)
    codes = _codes(torch.stack([blocks >> 6 - 2 * i & 3 for i in range(4)], dim=1).reshape(shape))
    return codes, struct.unpack("<f", bytes(packed[num_bytes : num_bytes + 4].tolist()))[0]


def _codes(values: Tensor) -> Tensor:
    if values.numel() and int(values.max()) > 2:
        raise ValueError("packed weights hold a code that is none of -1, 0, 1; damaged, or another format")
    return values.to(torch.int8) - 1
