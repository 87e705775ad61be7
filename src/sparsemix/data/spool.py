"""Documents on disk while a corpus is prepared: memory holds some 60 bytes for each, whatever their texts take."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64, UInt8

T = TypeVar("T")
BATCH = 1 << 20


class Rows:
    """An array that grows by whole arrays; `array` joins them."""

    def __init__(self, dtype: Any, *shape: int) -> None:
        self.parts = [np.zeros((0, *shape), dtype)]

    @classmethod
    def of(cls, array: np.ndarray) -> "Rows":
        rows = cls(array.dtype, *array.shape[1:])
        rows.add(array)
        return rows

    def add(self, rows: np.ndarray) -> None:
        self.parts.append(rows.astype(self.parts[0].dtype, copy=False))

    @property
    def array(self) -> np.ndarray:
        if len(self.parts) > 1:
            self.parts = [np.concatenate(self.parts)]
        return self.parts[0]


class Spool:
    """Texts in a nameless file, which the system deletes when the process ends, however that is."""

    def __init__(self, files: ExitStack, folder: Path | None = None) -> None:
        self._file = files.enter_context(TemporaryFile(dir=folder))  # noqa: SIM115  (the stack closes it)
        self._sizes, self._hashes = Rows(np.int64), Rows(np.uint8, 32)
        self._firsts, self._end = Rows(np.int64), 0

    def add(self, texts: Sequence[str]) -> None:
        raw = [text.encode() for text in texts]
        self._file.seek(self._end)
        self._file.write(b"".join(raw))
        sizes = np.array([len(part) for part in raw], np.int64)
        self._sizes.add(sizes)
        self._firsts.add(self._end + np.cumsum(sizes) - sizes)
        self._end += int(sizes.sum())
        digests = b"".join(hashlib.sha256(part).digest() for part in raw)
        self._hashes.add(np.frombuffer(digests, np.uint8).reshape(-1, 32))

    def only(self, indices: Int64[np.ndarray, "K"]) -> "Spool":
        """These of its texts, in the same file."""
        view = copy.copy(self)
        view._sizes, view._hashes, view._firsts = (Rows.of(rows.array[indices]) for rows in self._columns())
        return view

    def _columns(self) -> tuple[Rows, Rows, Rows]:
        return self._sizes, self._hashes, self._firsts

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def sizes(self) -> Int64[np.ndarray, "D"]:
        """UTF-8 bytes of each text."""
        return self._sizes.array

    @property
    def hashes(self) -> UInt8[np.ndarray, "D 32"]:
        """SHA-256 of each text's UTF-8 bytes."""
        return self._hashes.array

    def texts(self, indices: Iterable[int]) -> Iterator[str]:
        """The texts with these indices, in that order."""
        for i in indices:
            yield self.raw(i, 0, int(self.sizes[i])).decode()

    def raw(self, document: int, first: int, last: int) -> bytes:
        """Its UTF-8 bytes from `first` to before `last`."""
        self._file.seek(int(self._firsts.array[document]) + first)
        return self._file.read(max(0, last - first))


def batched(texts: Iterable[T], size: Callable[[T], int], most: int = 1 << 14) -> Iterator[list[T]]:
    """Runs of texts of `BATCH` characters in all or somewhat more, and of at most `most` texts."""
    held: list[T] = []
    total = 0
    for text in texts:
        held.append(text)
        total += size(text)
        if total >= BATCH or len(held) >= most:
            yield held
            held, total = [], 0
    if held:
        yield held
