"""How much of held-out text stands word for word in the training text."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from sparsemix.data.corpus import mix64

WINDOW = 20
# Above this share of held-out windows a warning is due.
WARNED = 0.1
# Of a split's windows so many are looked for, at most: the error of a share is then below 0.2 %.
_BLOCK, _SAMPLE = 1 << 18, 1 << 17
_FILTER_BITS = 23


class TokenFile:
    """Ids of a file, read slice by slice: what a memory map has shown stays in memory."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger[Any]]) -> None:
        self._path, self._dtype = path, np.dtype(dtype)

    def __len__(self) -> int:
        return self._path.stat().st_size // self._dtype.itemsize

    def __getitem__(self, at: slice) -> np.ndarray:
        first, last, _ = at.indices(len(self))
        return np.fromfile(self._path, self._dtype, count=last - first, offset=first * self._dtype.itemsize)


Tokens = np.ndarray | TokenFile


def contamination(
    tokens: Mapping[str, Tokens], end_of_text: int, on_tokens: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """{split: the share of its windows of 20 tokens that occur in train, "window": 20, "windows": {split: how many}}
    for every split but train.

    A window begins at each token and lies within one document; a split of more than 2^17 windows is measured on those
    whose hash is among the smallest, a random sample of them. on_tokens gets the training tokens done so far."""
    held, counts, places = {}, {}, {}
    for split in (name for name in tokens if name != "train"):
        held[split], counts[split] = np.unique(_sample(tokens[split], end_of_text), return_counts=True)
        places[split] = np.zeros(len(held[split]), bool)
    # Most windows of train are in no split: a table of bits of their hash says so without a search.
    table = np.zeros(1 << _FILTER_BITS, bool)
    for hashes in held.values():
        table[hashes >> np.uint64(64 - _FILTER_BITS)] = True
    for start, hashes in _windows(tokens["train"], end_of_text):
        some = hashes[table[hashes >> np.uint64(64 - _FILTER_BITS)]]
        for split, known in held.items():
            at = np.minimum(np.searchsorted(known, some), max(0, len(known) - 1))
            if len(known):
                places[split][at[known[at] == some]] = True
        if on_tokens:
            on_tokens(start)
    shares = {s: float(counts[s][places[s]].sum() / max(1, counts[s].sum())) for s in held}
    return {**shares, "window": WINDOW, "windows": {s: int(counts[s].sum()) for s in held}}


def _sample(tokens: Tokens, end_of_text: int) -> UInt64[np.ndarray, "S"]:
    limit, kept = 1 << 64, np.zeros(0, np.uint64)
    for _, hashes in _windows(tokens, end_of_text):
        kept = np.append(kept, hashes if limit == 1 << 64 else hashes[hashes < np.uint64(limit)])
        while len(kept) > _SAMPLE:
            limit >>= 1
            kept = kept[kept < np.uint64(limit)]
    return kept


def _windows(tokens: Tokens, end_of_text: int) -> Iterator[tuple[int, UInt64[np.ndarray, "N"]]]:
    """(index of the first token of a block, hashes of the windows that begin in it and hold no end of text)."""
    for start in range(0, len(tokens), _BLOCK):
        ids = np.asarray(tokens[start : start + _BLOCK + WINDOW - 1])
        count = len(ids) - WINDOW + 1
        if count <= 0:
            return
        # Windows of 1, 2, 4, 8, 16 tokens from two of half the length, then 20 from 16 and 4.
        doubled = [ids.astype(np.uint64) + np.uint64(1)]
        for length in (1, 2, 4, 8):
            doubled.append(_pair(doubled[-1], doubled[-1], length))
        hashes = mix64(_pair(doubled[4], doubled[2], 16)[:count])
        ends = np.cumsum(ids == end_of_text)
        whole = ends[WINDOW - 1 :] == np.append(0, ends[: count - 1])
        yield start, hashes[whole]


def _pair(first: np.ndarray, second: np.ndarray, gap: int) -> UInt64[np.ndarray, "N"]:
    """A hash of first[i] and second[i + gap]."""
    folded = first * np.uint64(0x9E3779B97F4A7C15)
    folded ^= folded >> np.uint64(29)
    count = min(len(first), len(second) - gap)
    return folded[:count] + second[gap : gap + count]


def warning(measured: Mapping[str, Any]) -> Iterator[str]:
    """A line for each split of which more than a tenth stands in train."""
    for split in ("test", "validation"):
        if measured[split] > WARNED:
            yield (
                f"{measured[split]:.0%} of the {split} split's windows of {WINDOW} tokens stand word for word in the "
                "training text; its losses are too low: remove repeated text, or keep it together (--split folder)"
            )
