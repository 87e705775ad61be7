"""Texts -> hashes of their shingles: five units in a row, a unit being a word, or less where words are not apart."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt32, UInt64

from sparsemix.data.corpus import mix64

LENGTH = 5
BLOCK = 1 << 19
# A longer word breaks where letters and other signs meet (minified code has no spaces), and a longer run of letters and
# digits is no word (a key, DNA, base 64): each `_WINDOW` characters of it are a unit.
_LONGEST, _WINDOW = 64, 12
_SPACE, _ALNUM, _OTHER, _SINGLE = range(4)
# What str.split() splits at.
_SPACES = (*range(0x9, 0xE), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F)
_SPACES += (0x205F, 0x3000)
# Scripts without spaces between words: a character is a unit.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x19E0, 0x1AAF),  # Khmer symbols, Tai Tham
    (0x2E80, 0x312F),  # CJK radicals and punctuation, Japanese kana, Bopomofo
    (0x31A0, 0x4DBF),  # Kana extensions, CJK extension A
    (0x4E00, 0xA4CF),  # CJK, Yi
    (0xA9E0, 0xA9FF),  # Myanmar extension
    (0xAA60, 0xAADF),  # Myanmar and Tai Viet
    (0xF900, 0xFAFF),  # CJK compatibility
    (0xFE30, 0xFE4F),  # CJK compatibility forms
    (0xFF00, 0xFFEF),  # Half and full width
    (0x1AFF0, 0x1B2FF),  # Kana, Nushu
    (0x20000, 0x3FFFF),  # CJK extensions
)


class Shingles(NamedTuple):
    """Hashes, and the index of the text that each belongs to, ascending."""

    hashes: UInt64[np.ndarray, "S"]
    owners: Int64[np.ndarray, "S"]


@functools.cache
def _classes() -> UInt8[np.ndarray, "1114112"]:
    table = np.full(0x110000, _ALNUM, np.uint8)
    ascii_other = [c for c in range(128) if not chr(c).isalnum()]
    table[ascii_other] = _OTHER
    # Signs of Latin-1 and the general punctuation.
    table[[*range(0x80, 0xAA), *range(0xAB, 0xB2), *range(0xB4, 0xB9), *range(0xBB, 0xC0), 0xD7, 0xF7]] = _OTHER
    table[0x2000:0x2070] = _OTHER
    for first, last in _UNSPACED:
        table[first : last + 1] = _SINGLE
    table[list(_SPACES)] = _SPACE
    return table


@functools.cache
def _factors() -> UInt64[np.ndarray, "5"]:
    return mix64(np.arange(1, LENGTH + 1, dtype=np.uint64)) | np.uint64(1)


@functools.cache
def _powers() -> tuple[UInt64[np.ndarray, "P"], UInt64[np.ndarray, "P"]]:
    """base^i and base^-i modulo 2^64 for each place of a block."""
    base = 0x9E3779B97F4A7C15
    both = (np.full(BLOCK + 2, factor, np.uint64) for factor in (base, pow(base, -1, 1 << 64)))
    first, second = (np.cumprod(np.append(np.uint64(1), factors[1:])) for factors in both)
    return first, second


def shingles(texts: Sequence[str]) -> Iterator[Shingles]:
    """The shingles of each text, block by block of at most `BLOCK` characters and one text's rest; a text of fewer
    units is one shingle, white space does not count, and a text of white space alone has none.

    A unit is what stands between white space, like a word. In scripts without spaces (Chinese, Japanese, Thai, Lao,
    Khmer, Myanmar, Tibetan, Yi) each character is one; a word of more than 64 characters breaks where letters and
    digits meet other signs, and a run of more than 64 letters and digits gives a unit of 12 for each character. Memory
    is bounded by the block; a longer text loses the four shingles over each border of two blocks."""
    held: list[str] = []
    owners: list[int] = []
    size = 0
    for owner, text in enumerate(texts):
        for piece in pieces(text, BLOCK):
            if size + len(piece) > BLOCK and held:
                yield _block(held, owners)
                held, owners, size = [], [], 0
            held.append(piece)
            owners.append(owner)
            size += len(piece) + 1
    if held:
        yield _block(held, owners)


def pieces(text: str, size: int) -> Iterator[str]:
    """Cuts of at most `size` characters: before white space that follows a word if there is some near the end."""
    start = 0
    while len(text) - start > size:
        near = range(start + size, start + size - min(size // 2, 4096), -1)
        end = next((i for i in near if text[i].isspace() and not text[i - 1].isspace()), start + size)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _block(texts: list[str], owners: list[int]) -> Shingles:
    lengths = np.array([len(text) + 1 for text in texts])
    # A space after each text: no unit goes over two.
    signs = np.frombuffer(" ".join([*texts, ""]).encode("utf-32-le"), np.uint32)
    hashes, starts = _units(signs)
    text = np.searchsorted(np.cumsum(lengths), starts, side="right")
    first = np.flatnonzero(np.append(True, text[1:] != text[:-1])[: len(text)])
    count = np.diff(np.append(first, len(text)))
    padded = np.append(hashes, np.zeros(LENGTH, np.uint64))
    summed = np.zeros(len(hashes), np.uint64)
    for k in range(LENGTH):
        summed += padded[k : k + len(hashes)] * _factors()[k]
    whole = np.ones(len(hashes), bool)
    for k in range(1, LENGTH):
        # The last four units of a text begin no shingle.
        whole[first + np.maximum(count - k, 0)] = False
    short = np.flatnonzero(count < LENGTH)
    whole[first[short]] = True
    summed[first[short]] = 0
    for k in range(LENGTH - 1):
        some = short[count[short] > k]
        summed[first[some]] += hashes[first[some] + k] * _factors()[k]
    return Shingles(mix64(summed[whole]), np.array(owners)[text[whole]])


def _units(signs: UInt32[np.ndarray, "C"]) -> tuple[UInt64[np.ndarray, "U"], Int64[np.ndarray, "U"]]:
    """(hash, first character) of each unit of what ends with white space."""
    kinds = _classes()[signs]
    solid = kinds != _SPACE
    begins = solid.copy()
    begins[1:] &= ~solid[:-1]
    single = kinds == _SINGLE
    if single.any():
        begins |= single
        begins[1:] |= solid[1:] & single[:-1]
    starts, ends = _bounds(begins, solid)
    if (ends - starts).max(initial=0) > _LONGEST:
        # Where letters and digits meet other signs, and at each such sign.
        at, _ = _spread(*(edge[ends - starts > _LONGEST] for edge in (starts, ends)))
        begins[at[(kinds[at] == _OTHER) | (kinds[at - 1] == _OTHER)]] = True
        starts, ends = _bounds(begins, solid)
    # sum_k value_{start + k} base^k modulo 2^64, from the running sum of value_i base^i.
    powers, inverse = _powers()
    total = np.zeros(len(signs) + 1, np.uint64)
    np.cumsum((signs + np.uint32(1)) * powers[: len(signs)], out=total[1:])
    runs = ends - starts > _LONGEST
    if not runs.any():
        return mix64((total[ends] - total[starts]) * inverse[starts]), starts
    at, end = _spread(starts[runs], ends[runs])
    starts = np.concatenate([starts[~runs], at])
    ends = np.concatenate([ends[~runs], np.minimum(at + _WINDOW, end)])
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    return mix64((total[ends] - total[starts]) * inverse[starts]), starts


def _bounds(begins: np.ndarray, solid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first character, the one after the last) of each unit: it ends where the next begins or white space does."""
    stops = np.flatnonzero(begins | ~solid)
    which = np.flatnonzero(begins[stops])
    return stops[which], stops[which + 1] if len(which) else stops[:0]


def _spread(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(each position from starts to ends, the end of its run)."""
    lengths = ends - starts
    first = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - first, lengths), np.repeat(ends, lengths)
