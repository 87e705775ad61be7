"""What reading text took and what it left out, counted while it is read, and said in one line."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

_KINDS_SAID, _KINDS_NAMED = 6, 12


class Skip(NamedTuple):
    """What something is that was left out (`.png`, `link`, `row`), and why."""

    kind: str
    why: str


class Tally:
    """Counts of what was read and of what was skipped, by kind and reason. `as_dict` is what a manifest keeps."""

    def __init__(self) -> None:
        self.files = self.found = self.data_sets = 0
        self.bytes = self.documents = self.cut = 0
        self.duplicates: int | None = None
        """Set by whoever looks for them; None where nobody does."""
        self.skipped: Counter[Skip] = Counter()
        self.examples: dict[Skip, str] = {}

    @classmethod
    def of(cls, text: str) -> "Tally":
        """That of one file that holds one text."""
        made = cls()
        made.files = made.found = made.documents = 1
        made.bytes = len(text.encode("utf-8", "surrogateescape"))
        return made

    def skip(self, kind: str, why: str, example: str) -> None:
        """Something was left out; of each kind and reason the first is named."""
        self.skipped[Skip(kind, why)] += 1
        self.examples.setdefault(Skip(kind, why), example)

    def add(self, other: "Tally") -> None:
        """Take over what another one skipped."""
        self.skipped.update(other.skipped)
        self.examples = other.examples | self.examples

    def as_dict(self) -> dict[str, Any]:
        """Everything counted, as JSON holds it, and `line`, which says it."""
        return {
            "files": self.files,
            "files_found": self.found,
            "data_sets": self.data_sets,
            "bytes": self.bytes,
            "documents": self.documents,
            "cut": self.cut,
            "duplicates": self.duplicates,
            "skipped": [
                {"kind": skip.kind, "why": skip.why, "count": count, "example": self.examples[skip]}
                for skip, count in self.skipped.most_common()
            ],
            "line": self.line(),
        }

    def line(self) -> str:
        """`read: 3 files, 1.2 MB, 45 documents, 2 duplicates dropped; skipped: 109 .asc (look like text; ...)`"""
        of = f" of {self.found}" if self.files != self.found else ""
        sets = f" and {_many(self.data_sets, 'data set')}" if self.data_sets else ""
        said = [
            f"{self.files}{of} file{'' if (self.found or self.files) == 1 else 's'}{sets}",
            size_of(self.bytes),
            _many(self.documents, "document"),
            "duplicates kept" if self.duplicates is None else f"{_many(self.duplicates, 'duplicate')} dropped",
        ]
        if self.cut:
            said.append(f"{self.cut} long ones cut")
        return f"read: {', '.join(said)}; {self.skips()}"

    def skips(self) -> str:
        """`skipped: 2 .png (not text, such as a/b.png), ...`: first what could be read by asking, then the most
        frequent; of the last ones the kind alone."""
        skipped = sorted(self.skipped.most_common(), key=lambda entry: not entry[0].why.startswith("looks like text"))
        kinds = [f"{n:,} {s.kind} ({s.why}, {_first(n)}{self.examples[s]})" for s, n in skipped[:_KINDS_SAID]]
        if left := skipped[_KINDS_SAID:]:
            names = [f"{n:,} {s.kind}" for s, n in left[:_KINDS_NAMED]]
            rest = left[_KINDS_NAMED:]
            kinds += [*names, *([f"{sum(n for _, n in rest):,} of {len(rest)} more kinds"] if rest else [])]
        return f"skipped: {', '.join(kinds) or 'nothing'}"


def read_line(manifest: Mapping[str, Any]) -> str:
    """The line of a preparation, from its manifest."""
    return manifest.get("read", {}).get("line", "read: not recorded, an earlier version prepared this text")


def _first(count: int) -> str:
    return "such as " if count > 1 else ""


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def size_of(count: int) -> str:
    """`1.2 MB`: bytes in the largest unit of which there is one."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
