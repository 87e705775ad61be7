"""Where documents came from, for splits by file, folder or time."""

import functools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sparsemix.config import ConfigError
from sparsemix.data.corpus import SPLITS
from sparsemix.data.documents import Document
from sparsemix.inputs import expanded


class Origins:
    """The file, folder or time of each document, as `rule` needs it; nothing for the rule `hash`."""

    def __init__(self, rule: str, sources: Sequence[str]) -> None:
        self.rule = rule
        self._roots = [path for source in sources if (path := expanded(source)).is_dir()]
        self._known: dict[str, int] = {}
        self._values, self._numbers, self._last = array("d"), array("q"), ""

    @property
    def named(self) -> bool:
        """Whether groups come from here and not from what the documents say."""
        return self.rule != "hash"

    def noted(self, documents: Iterable[Document]) -> Iterator[str]:
        """Their texts. Raises ConfigError for a time that cannot be known."""
        for document in documents:
            # A long document comes in parts, one after the other under its name.
            further = bool(self._numbers) and document.name == self._last
            self._numbers.append(len(self._numbers) if not further else self._numbers[-1])
            self._last = document.name
            if self.named:
                self._values.append(self._value(document.name))
            yield document.text

    @property
    def numbers(self) -> Int64[np.ndarray, "D"]:
        """For each text the first text of the document that it is a part of."""
        return np.array(self._numbers, np.int64)

    def groups(self, kept: Bool[np.ndarray, "D"]) -> Int64[np.ndarray, "K"]:
        """A number for each file or folder; by time each document is its own."""
        if self.rule == "time":
            return np.arange(int(kept.sum()))
        return np.array(self._values, np.int64)[kept]

    def check(self, kept: Bool[np.ndarray, "D"]) -> None:
        """Raises ConfigError if there are too few files or folders for three splits."""
        if self.rule in ("file", "folder") and (count := len(np.unique(self.groups(kept)))) < len(SPLITS):
            rule = f"needs text from {len(SPLITS)} {self.rule}s at least, and this is from {count}"
            raise ConfigError(f"split={self.rule} {rule}; add {self.rule}s, or leave the split to the hash")

    def newest_first(self, kept: Bool[np.ndarray, "D"]) -> Float64[np.ndarray, "K"]:
        """A place in [0, 1) for each document: the newest file first, within a file what comes later in it."""
        times = np.array(self._values)[kept]
        order = np.lexsort((np.arange(len(times)), times))[::-1]
        places = np.empty(len(times))
        places[order] = np.arange(len(times)) / max(1, len(times))
        return places

    def _value(self, name: str) -> float:
        file = _file(name)
        if self.rule == "time":
            if file.startswith("hf:"):
                raise ConfigError(f"split=time orders files, and {name} is none; download it, or take another split")
            return _time(file)
        key = file if self.rule == "file" else self._folder(Path(file))
        return self._known.setdefault(key, len(self._known))

    def _folder(self, path: Path) -> str:
        for root in self._roots:
            if path.is_relative_to(root):
                inside = path.relative_to(root).parts
                # A file that lies in the source itself has no folder below it.
                return str(root / inside[0])
        return str(path.parent)


def _file(name: str) -> str:
    """The file that a document came from: its name without the line. A row of the Hub stays what it is."""
    head, colon, line = name.rpartition(":")
    return head if colon and line.isdecimal() and _is_file(head) else name


@functools.lru_cache(maxsize=1 << 10)
def _is_file(name: str) -> bool:
    return Path(name).is_file()


@functools.lru_cache(maxsize=1 << 10)
def _time(name: str) -> float:
    return Path(name).stat().st_mtime
