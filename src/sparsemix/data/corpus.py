"""Text sources -> documents, near-duplicates dropped, split by hash."""

import functools
import hashlib
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import UInt64

from sparsemix.data.documents import Document

SPLITS = ("train", "validation", "test")
_SHINGLE, _BANDS, _ROWS, _SAME = 5, 16, 4, 0.8


def mix64(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """SplitMix64's finaliser: a bijection of 64-bit words that spreads every bit over all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _signature(text: str, hash_word: Callable[[str], int], factors: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """MinHash of the set of 5-word shingles, (64,); a text of fewer words is one shingle."""
    words = text.split()
    ids = np.zeros(max(len(words), _SHINGLE), np.uint64)
    ids[: len(words)] = [hash_word(word) for word in words]
    shingles = np.zeros(len(ids) - _SHINGLE + 1, np.uint64)
    for k in range(_SHINGLE):
        shingles = mix64(shingles + ids[k : k + len(shingles)])
    signature = np.full(len(factors), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), 4096):
        hashed = shingles[start : start + 4096, None] * factors + offsets
        signature = np.minimum(signature, hashed.min(axis=0))
    return signature


def deduplicate(documents: Iterable[Document]) -> tuple[list[Document], int]:
    """(the documents without exact and near duplicates, the number dropped); the first of each group stays.

    Near: MinHash over 5-word shingles finds pairs (16 bands of 4) and estimates their Jaccard similarity; 0.8 and
    above is a duplicate. White space does not count. Holds the kept documents in memory."""
    seeds = mix64(np.arange(1, 2 * _BANDS * _ROWS + 1, dtype=np.uint64))
    factors, offsets = seeds[::2] | np.uint64(1), seeds[1::2]
    hash_word, buckets = functools.cache(_hash_word), {}
    kept: list[Document] = []
    signatures, dropped = [], 0
    for document in documents:
        signature = _signature(document.text, hash_word, factors, offsets)
        keys = [(band, row.tobytes()) for band, row in enumerate(signature.reshape(_BANDS, _ROWS))]
        near = sorted({i for key in keys for i in buckets.get(key, ())})
        if near and (np.stack([signatures[i] for i in near]) == signature).mean(axis=1).max() >= _SAME:
            dropped += 1
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        kept.append(document)
        signatures.append(signature)
    return kept, dropped


def sha256(text: str) -> str:
    """The SHA-256 of the text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over the sorted SHA-256 of the texts: names the corpus whatever the order of its documents."""
    return hashlib.sha256("".join(sorted(sha256(d.text) for d in documents)).encode()).hexdigest()


def split_of(text: str, validation_fraction: float, test_fraction: float) -> str:
    """'train', 'validation' or 'test', decided by the SHA-256 of the text alone.

    Test comes first, so another validation_fraction moves no document into or out of the test split."""
    u = int(sha256(text)[:16], 16) / 2**64
    return "test" if u < test_fraction else "validation" if u < test_fraction + validation_fraction else "train"
