"""Which texts say the same: exact and near duplicates, and texts of which a good part stands in another."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from sparsemix.data.corpus import mix64
from sparsemix.data.shingles import shingles
from sparsemix.data.spool import Rows, Spool, batched

Report = Callable[[str, int, int | None], None]

_BINS, _BANDS = 64, 16
_SAME = 0.8
# Of a bucket's texts, how many a later one is compared with in a round, and how many rounds there are at most.
_COMPARED, _ROUNDS = 4, 8
# Hashes of one text that its similarity is computed from: of a longer text a random sample, error below 0.004.
_SAMPLE = 1 << 14
# Passages of the whole corpus that are kept to find shared parts, at most: of more a random sample.
_SHARED_SAMPLE = 1 << 22
# What more texts than this share is taken for boilerplate (a licence, a form), which binds nobody.
_BOILERPLATE = 16
# A passage is 13 units in a row, those of three shingles, the last of which begins so much later. Less is often shared
# by chance or custom; GPT-3's authors took 13 words too (arXiv:2005.14165, appendix C).
_LATER = 8
# Two texts belong together if this share of one's passages stands in the other, and so many of the sample.
_SHARED, _SHARED_LEAST = 0.1, 3
_EMPTY = np.uint64(np.iinfo(np.uint64).max)


class Index:
    """What is kept of each text: a key of its set of shingles, 16 band keys (on disk), and a sample of its passages."""

    def __init__(self, files: ExitStack, folder: Path | None = None) -> None:
        made = (TemporaryFile(dir=folder) for _ in range(_BANDS))  # noqa: SIM115  (the stack closes them)
        self._bands = [files.enter_context(file) for file in made]
        self._keys = Rows(np.uint64)
        self._hashes, self._owners = Rows(np.uint64), Rows(np.int64)
        self._limit, self._held = 1 << 64, 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def keys(self) -> UInt64[np.ndarray, "D"]:
        return self._keys.array

    def add(self, texts: Sequence[str]) -> None:
        """Takes the next texts."""
        first = len(self)
        bins = np.full(len(texts) * _BINS, _EMPTY, np.uint64)
        keys = np.zeros(len(texts), np.uint64)
        for hashes, owners in shingles(texts):
            at = owners * _BINS + (hashes >> np.uint64(58)).astype(np.int64)
            np.minimum.at(bins, at, hashes)
            np.add.at(keys, owners, mix64(hashes + np.uint64(1)))
            self._sample(*passages(hashes, owners + first))
        self._keys.add(keys)
        bands = _filled(bins.reshape(-1, _BINS)).reshape(len(texts), _BANDS, -1)
        mixed = np.zeros(bands.shape[:2], np.uint64)
        for k in range(bands.shape[2]):
            mixed = mix64(mixed + bands[:, :, k])
        for band, file in enumerate(self._bands):
            mixed[:, band].tofile(file)

    def _sample(self, hashes: np.ndarray, owners: np.ndarray) -> None:
        hashes, owners = _below(self._limit, hashes, owners)
        while True:
            self._hashes.add(hashes)
            self._owners.add(owners)
            self._held += len(hashes)
            if self._held <= _SHARED_SAMPLE:
                return
            self._limit >>= 1
            hashes, owners = _below(self._limit, self._hashes.array, self._owners.array)
            self._hashes, self._owners, self._held = Rows(np.uint64), Rows(np.int64), 0

    def candidates(self, kept: Bool[np.ndarray, "D"]) -> Int64[np.ndarray, "P 2"]:
        """Pairs (later, earlier) of kept texts that share a band, each with the first few of its bucket."""
        alive = np.flatnonzero(kept)
        pairs = np.zeros(0, np.int64)
        for file in self._bands:
            file.seek(0)
            keys = np.fromfile(file, np.uint64)[alive]
            order = np.argsort(keys, kind="stable")
            first, place = _runs(keys[order])
            for k in range(_COMPARED):
                later = np.flatnonzero(place > k)
                found = alive[order[later]] * len(kept) + alive[order[first[later] + k]]
                pairs = np.union1d(pairs, found)
        return np.stack(np.divmod(pairs, max(1, len(kept))), axis=1)

    def clusters(self, kept: Bool[np.ndarray, "D"], documents: Int64[np.ndarray, "D"]) -> Int64[np.ndarray, "D"]:
        """For each text the first text of its cluster: texts of which a tenth stands in another, chained. Texts that
        follow each other and are parts of one of the `documents` are in one."""
        hashes, owners = self._hashes.array, self._owners.array
        mine = kept[owners]
        # Owners ascend, so a stable sort leaves them in order; a passage that a text has twice counts once.
        order = np.argsort(hashes[mine], kind="stable")
        hashes, owners = hashes[mine][order], owners[mine][order]
        once = np.append(True, (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1]))[: len(hashes)]
        hashes, owners = hashes[once], owners[once]
        held = np.bincount(owners, minlength=len(kept))
        first, place = _runs(hashes)
        rare = np.bincount(first, minlength=len(first))[first] <= _BOILERPLATE
        later = np.flatnonzero(rare & (place > 0))
        # With the bucket's first text and with the one before: chains bind the rest.
        again = later[place[later] > 1]
        mates = np.concatenate([owners[first[later]], owners[again - 1]])
        pairs, shared = np.unique(
            mates * len(kept) + np.concatenate([owners[later], owners[again]]), return_counts=True
        )
        a, b = np.divmod(pairs, max(1, len(kept)))
        bound = shared >= np.maximum(_SHARED_LEAST, _SHARED * np.minimum(held[a], held[b]))
        there = np.flatnonzero(kept)
        parts = documents[there[1:]] == documents[there[:-1]]
        joined = ((a[bound], b[bound]), (there[:-1][parts], there[1:][parts]))
        return _joined(len(kept), *(np.concatenate(ends) for ends in zip(*joined, strict=True)))


class _Sample(NamedTuple):
    """The sorted distinct shingle hashes of a text that are below `limit`."""

    hashes: UInt64[np.ndarray, "S"]
    limit: int


def passages(hashes: UInt64[np.ndarray, "S"], owners: Int64[np.ndarray, "S"]) -> tuple[np.ndarray, np.ndarray]:
    """(hash, owner) of each passage of a block of shingles."""
    one = owners[_LATER:] == owners[:-_LATER]
    middle = hashes[_LATER // 2 : len(hashes) - _LATER // 2] * np.uint64(5)
    return mix64(hashes[:-_LATER] * np.uint64(3) + middle + hashes[_LATER:])[one], owners[:-_LATER][one]


def _below(limit: int, hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if limit == 1 << 64:
        return hashes, owners
    there = hashes < np.uint64(limit)
    return hashes[there], owners[there]


def _runs(ordered: np.ndarray) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """(index of the first of its run of equal values, place in the run) of each."""
    fresh = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    first = np.repeat(fresh, np.diff(np.append(fresh, len(ordered))))
    return first, np.arange(len(ordered)) - first


def _filled(bins: UInt64[np.ndarray, "D 64"]) -> UInt64[np.ndarray, "D 64"]:
    """Empty bins take the value of another, in an order of its own for each bin.

    So equal bins stay as likely as the sets are similar, however few shingles there are: one permutation hashing with
    the densification of arXiv:1703.04664."""
    turns = np.argsort(mix64(np.arange(1, _BINS * _BINS + 1, dtype=np.uint64)).reshape(_BINS, _BINS), axis=1)
    gaps = np.flatnonzero((bins == _EMPTY).any(axis=1) & (bins != _EMPTY).any(axis=1))
    for start in range(0, len(gaps), 1024):
        rows = bins[gaps[start : start + 1024]]
        there = (rows != _EMPTY)[:, turns].argmax(axis=2)  # (R, 64)
        source = np.take_along_axis(turns[None], there[:, :, None], axis=2)[:, :, 0]
        bins[gaps[start : start + 1024]] = np.where(rows != _EMPTY, rows, np.take_along_axis(rows, source, axis=1))
    return bins


def _joined(count: int, a: np.ndarray, b: np.ndarray) -> Int64[np.ndarray, "D"]:
    """Connected components: for each node the smallest node of its component."""
    root = np.arange(count)
    while len(a):
        # Every edge pulls the larger root of its two ends down to the smaller, then paths are shortened.
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]
    return root


def keep(spool: Spool, index: Index, report: Report) -> Bool[np.ndarray, "D"]:
    """Which texts stay: the first of each set of duplicates. White space does not count.

    Duplicates have the same shingles, or sets of them of Jaccard similarity 0.8 or more. Candidates are found by
    MinHash (16 bands of 4), their similarity is exact, or sampled for texts of more than 2^14 shingles. A bucket's
    texts are compared with the first four that stay in it, over at most eight rounds, so that the work stays linear
    in the texts where many are alike."""
    _, first = np.unique(index.keys, return_index=True)
    kept = np.zeros(len(index), bool)
    kept[first] = True
    checked = np.zeros((0,), np.int64)
    for _ in range(_ROUNDS):
        pairs = index.candidates(kept)
        codes = pairs[:, 0] * len(kept) + pairs[:, 1]
        pairs = pairs[~np.isin(codes, checked)]
        checked = np.union1d(checked, codes)
        dropped = 0
        for (later, earlier), alike in zip(pairs.tolist(), _similarities(spool, pairs, report), strict=True):
            if alike >= _SAME and kept[later] and kept[earlier]:
                kept[later] = False
                dropped += 1
        if not dropped:
            break
    return kept


def _similarities(spool: Spool, pairs: Int64[np.ndarray, "P 2"], report: Report) -> Iterator[float]:
    """The Jaccard similarity of each pair. The samples of texts that were read last are held, 2^23 hashes at most."""
    held: dict[int, _Sample] = {}
    for start in range(0, len(pairs), 256):
        report("deduplicating", start, len(pairs))
        chunk = pairs[start : start + 256]
        missing = [i for i in np.unique(chunk).tolist() if i not in held]
        if sum(len(sample.hashes) for sample in held.values()) > 1 << 23:
            held, missing = {}, np.unique(chunk).tolist()
        for batch in batched(spool.texts(missing), len):
            for sample in _samples(batch):
                held[missing[0]] = sample
                missing = missing[1:]
        for later, earlier in chunk.tolist():
            yield _jaccard(held[later], held[earlier])


def _samples(texts: Sequence[str]) -> list[_Sample]:
    found = [_Sample(np.zeros(0, np.uint64), 1 << 64) for _ in texts]
    for hashes, owners in shingles(texts):
        edges = np.flatnonzero(np.append(True, owners[1:] != owners[:-1]))
        for part, owner in zip(np.split(hashes, edges[1:]), owners[edges].tolist(), strict=True):
            there, limit = found[owner]
            there = np.union1d(there, part if limit == 1 << 64 else part[part < np.uint64(limit)])
            while len(there) > _SAMPLE:
                limit >>= 1
                there = there[there < np.uint64(limit)]
            found[owner] = _Sample(there, limit)
    return found


def _jaccard(a: _Sample, b: _Sample) -> float:
    limit = min(a.limit, b.limit)
    x, y = (s.hashes if s.limit == limit else s.hashes[s.hashes < np.uint64(limit)] for s in (a, b))
    both = len(np.intersect1d(x, y, assume_unique=True))
    return both / max(1, len(x) + len(y) - both)
