"""Texts -> token ids on disk, `EOT d1 EOT d2 ... EOT`: every word is encoded once, and found again by its hash."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64
from tokenizers import Tokenizer

from sparsemix.data.corpus import mix64
from sparsemix.data.spool import Rows, batched
from sparsemix.data.tokenizer import encode_batch, end_of_text, id_dtype, num_ids, train_tokenizer

# Bytes that are worked on at once. Longer texts are cut where they have white space.
_BLOCK = 1 << 20
# Words that are remembered, at most, and the longest of them in bytes.
_WORDS, _LONGEST = 1 << 19, 256
_SLOT_BITS = 21
# A tokenizer takes some 50 times the memory of a text: longer stretches without a place to break are cut.
_STRETCH = 1 << 16
# Stands for the end of text among UTF-8 bytes, of which it is none.
_MARK = b"\xff"
_SPACE, _WHITE, _LETTER, _DIGIT, _SIGN, _WIDE, _END = range(7)
# The first byte of white space that is not ASCII, and of other characters: what begins so may be white space.
_UNSURE = (0xC2, 0xE1, 0xE2, 0xE3)


def write_stream(
    tokenizer: Tokenizer, texts: Iterable[bytes], path: Path, on_bytes: Callable[[int], None] | None = None
) -> Int64[np.ndarray, "starts"]:
    """Writes `EOT d1 EOT d2 ... EOT` as raw ids; returns each document's first index, then that of the final EOT.

    With our own tokenizer each word is encoded once; the ids are those of the whole text. Only where a text of more
    than 1 MiB has no white space, or a stretch of more than 64 KiB no place at which words end, is it cut anywhere.
    on_bytes gets the UTF-8 bytes written so far."""
    encode = _Words(tokenizer).ids if is_own(tokenizer) else functools.partial(_other, tokenizer)
    starts, written, done = [], 0, 0
    with path.open("wb") as file:
        for block in batched(_marked(texts), len):
            raw = b"".join(block)
            ids, ends = encode(raw)
            starts.append(ends + written)
            ids.tofile(file)
            written, done = written + len(ids), done + len(raw) - len(ends)
            if on_bytes:
                on_bytes(done)
    return np.concatenate(starts)


def _marked(texts: Iterable[bytes]) -> Iterator[bytes]:
    """The texts in pieces, each text after a mark, and a last mark."""
    for text in texts:
        yield _MARK
        yield from byte_pieces(text, _BLOCK)
    yield _MARK


def byte_pieces(text: bytes, size: int) -> Iterator[bytes]:
    """Cuts of at most `size` bytes: before white space that follows a word if there is some near the end, else between
    two characters."""
    start = 0
    while len(text) - start > size:
        near = start + size - min(size // 2, 4096)
        word_ends = [match.end() for match in re.finditer(rb"[!-~](?=[ \t-\r])", text[near : start + size])]
        end = near + word_ends[-1] if word_ends else start + size
        while text[end] & 0xC0 == 0x80:
            end -= 1
        yield text[start:end]
        start = end
    yield text[start:] if start else text


@functools.cache
def _kinds() -> UInt8[np.ndarray, "256"]:
    table = np.full(256, _WIDE, np.uint8)
    for byte in range(128):
        sign = chr(byte)
        white = sign in "\t\n\v\f\r"
        table[byte] = _WHITE if white else _LETTER if sign.isalpha() else _DIGIT if sign.isdigit() else _SIGN
    table[0x20], table[0xFF] = _SPACE, _END
    return table


@functools.cache
def _surely_solid() -> Bool[np.ndarray, "256"]:
    """Whether a character that begins with this byte is surely no white space."""
    table = (_kinds() >= _LETTER) & (_kinds() <= _WIDE)
    table[list(_UNSURE)] = False
    return table


def cuts(raw: UInt8[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Where a stretch begins: some of the places between which the byte-level pre-tokenizer (GPT-2's pattern) breaks,
    most of them where words begin. Never within a character; what is not ASCII joins its neighbours."""
    kind, quote = _kinds()[raw], raw == 0x27
    before, after = np.append(np.uint8(_END), kind[:-1]), np.append(np.uint8(_END), kind[1:])
    solid_after = np.append(_surely_solid()[raw[1:]], False)
    plain = (kind >= _LETTER) & (kind <= _SIGN)
    plain_before = (before >= _LETTER) & (before <= _SIGN)
    # Letters, digits and signs of ASCII break where they meet, but for 's, 're and their like.
    found = plain & plain_before & (kind != before) & ~(np.append(False, quote[:-1]) & (kind == _LETTER))
    white = kind <= _WHITE
    # The last of a run of white space is apart; a space goes with what follows, another is a token.
    last = white & solid_after
    found |= last
    found[1:] |= (last & (kind == _WHITE))[:-1]
    # All before the last of the run is one token.
    found |= white & (after <= _WHITE) & plain_before
    found |= (kind == _END) | (before == _END)
    found[:1] = True
    return found


@functools.cache
def _powers(count: int) -> tuple[UInt64[np.ndarray, "P"], UInt64[np.ndarray, "P"]]:
    """base^i and base^-i modulo 2^64."""
    base = 0x9E3779B97F4A7C15
    both = (np.full(count, factor, np.uint64) for factor in (base, pow(base, -1, 1 << 64)))
    first, second = (np.cumprod(np.append(np.uint64(1), factors)) for factors in both)
    return first, second


def _hashes(raw: UInt8[np.ndarray, "N"], edges: Int64[np.ndarray, "E"]) -> UInt64[np.ndarray, "S"]:
    """A hash of the bytes between each two edges: a polynomial, equal wherever they stand, then mixed."""
    powers, inverse = _powers(1 << max(20, len(raw).bit_length()))
    total = np.zeros(len(raw) + 1, np.uint64)
    np.cumsum((raw.astype(np.uint64) + np.uint64(1)) * powers[: len(raw)], out=total[1:])
    return mix64((total[edges[1:]] - total[edges[:-1]]) * inverse[edges[:-1]])


class _Words:
    """Stretch -> its ids, encoded when it is first seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._dtype = tokenizer, id_dtype(num_ids(tokenizer))
        self._end = np.array([end_of_text(tokenizer)], self._dtype)
        self._clear()

    def _clear(self) -> None:
        self._flat, self._counts, self._size = Rows(self._dtype), Rows(np.int64), 0
        # Most are found in a table by some bits of their hash; what shares these with an earlier one, in the other.
        self._slot_hash = np.zeros(1 << _SLOT_BITS, np.uint64)
        self._slot_word = np.full(1 << _SLOT_BITS, -1, np.int32)
        self._known: dict[int, int] = {}
        self._add([self._end])

    def _add(self, encoded: list[np.ndarray]) -> int:
        """The number of the first of these words."""
        first = self._size
        self._flat.add(np.concatenate(encoded))
        self._counts.add(np.array([len(ids) for ids in encoded], np.int64))
        self._size += len(encoded)
        return first

    def ids(self, raw: bytes) -> tuple[np.ndarray, Int64[np.ndarray, "E"]]:
        """(the ids of what stands in `raw`, which of them stand for a mark)."""
        if self._size > _WORDS:
            self._clear()
        signs = np.frombuffer(raw, np.uint8)
        edges = np.append(np.flatnonzero(cuts(signs)), len(signs))
        words = self._words(raw, signs, edges)
        counts = self._counts.array
        first = np.cumsum(counts) - counts
        held = counts[words]
        at = np.cumsum(held) - held
        ids = self._flat.array[np.repeat(first[words] - at, held) + np.arange(held.sum())]
        return ids, at[words == 0]

    def _words(self, raw: bytes, signs: np.ndarray, edges: np.ndarray) -> Int64[np.ndarray, "S"]:
        hashes, size = _hashes(signs, edges), np.diff(edges)
        slots = (hashes >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
        words = self._slot_word[slots].astype(np.int64)
        words[self._slot_hash[slots] != hashes] = -1
        # A hash is trusted for what is short.
        words[size > _LONGEST] = -1
        words[signs[edges[:-1]] == 0xFF] = 0
        missing = np.flatnonzero(words < 0)
        short, long = missing[size[missing] <= _LONGEST], missing[size[missing] > _LONGEST]
        if len(short):
            distinct, at, back = np.unique(hashes[short], return_index=True, return_inverse=True)
            words[short] = self._short(raw, edges, distinct, short[at])[back]
        if len(long):
            encoded = self._encoded([raw[edges[i] : edges[i + 1]] for i in long.tolist()])
            words[long] = self._add(encoded) + np.arange(len(long))
        return words

    def _short(self, raw: bytes, edges: np.ndarray, hashes: np.ndarray, places: np.ndarray) -> Int64[np.ndarray, "M"]:
        """The words of these hashes, each of which stands at one of the places."""
        words = np.array([self._known.get(key, -1) for key in hashes.tolist()], np.int64)
        if len(new := np.flatnonzero(words < 0)):
            stretches = [raw[edges[i] : edges[i + 1]] for i in places[new].tolist()]
            words[new] = self._add(self._encoded(stretches)) + np.arange(len(new))
            self._known.update(zip(hashes[new].tolist(), words[new].tolist(), strict=True))
            slots = (hashes[new] >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
            free = self._slot_word[slots] < 0
            self._slot_hash[slots[free]], self._slot_word[slots[free]] = hashes[new][free], words[new][free]
        return words

    def _encoded(self, stretches: list[bytes]) -> list[np.ndarray]:
        parts = [[part.decode() for part in byte_pieces(stretch, _STRETCH)] for stretch in stretches]
        ids = iter(encode_batch(self._tokenizer, [part for several in parts for part in several]))
        return [np.concatenate([next(ids) for _ in several]).astype(self._dtype) for several in parts]


def _other(tokenizer: Tokenizer, raw: bytes) -> tuple[np.ndarray, Int64[np.ndarray, "E"]]:
    """What `_Words.ids` gives, by the tokenizer itself."""
    dtype, (head, *texts) = id_dtype(num_ids(tokenizer)), raw.split(_MARK)
    end = np.array([end_of_text(tokenizer)], dtype)
    encoded = [ids.astype(dtype) for ids in encode_batch(tokenizer, [head.decode(), *(t.decode() for t in texts)])]
    ids = [encoded[0], *(part for ids in encoded[1:] for part in (end, ids))]
    sizes = np.cumsum([len(ids) for ids in encoded])
    return np.concatenate(ids), (sizes[:-1] + np.arange(len(texts))).astype(np.int64)


def is_own(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer breaks text as those do that `train_tokenizer` makes."""
    made = json.loads(tokenizer.to_str())
    return all(made.get(part) == _ours()[part] for part in ("normalizer", "pre_tokenizer", "post_processor")) and all(
        token["special"] for token in made["added_tokens"]
    )


@functools.cache
def _ours() -> dict[str, Any]:
    return json.loads(train_tokenizer((), 257).to_str())
