"""Documents -> train, validation and test: by hash while that gives the right shares of the bytes, else by size."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int8, Int64, UInt8

from sparsemix.data.corpus import SPLITS
from sparsemix.data.spool import Spool

TRAIN, VALIDATION, TEST = range(3)
# A share may be this part of what was asked for, and exceed it by this part of all bytes.
_LEAST, _EXCESS = 1 / 3, 0.05
# A split with fewer documents gets its long ones in parts: this many at least, of these sizes.
_FEW, _PARTS, _PART_BYTES = 10, 20, (1 << 10, 1 << 14)


@dataclass
class Sides:
    """Where each document goes: `of` (of its rest, where it was cut), and the parts of those that were cut."""

    of: Int8[np.ndarray, "D"]
    parts: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    """Document -> (first byte, the one after the last, side) of its parts, in order."""

    @property
    def apart(self) -> list[int]:
        """The documents whose parts lie on more than one side."""
        return [document for document, parts in self.parts.items() if len({side for _, _, side in parts}) > 1]

    def shares(self, sizes: Int64[np.ndarray, "D"]) -> Float64[np.ndarray, "3"]:
        """Bytes of each side over all bytes."""
        whole = np.ones(len(sizes), bool)
        whole[list(self.parts)] = False
        held = np.bincount(self.of[whole], sizes[whole], minlength=3)
        for first, last, side in (part for parts in self.parts.values() for part in parts):
            held[side] += last - first
        return held / max(1, sizes.sum())

    def counts(self) -> Int64[np.ndarray, "3"]:
        """Documents (parts, where they were cut) of each side."""
        whole = np.ones(len(self.of), bool)
        whole[list(self.parts)] = False
        sides = [side for parts in self.parts.values() for _, _, side in parts]
        return np.bincount(np.append(self.of[whole], sides).astype(np.int64), minlength=3)


def uniform(hashes: UInt8[np.ndarray, "D 32"]) -> Float64[np.ndarray, "D"]:
    """A number in [0, 1) for each hash, from its first 8 bytes."""
    return hashes[:, :8].copy().view(">u8")[:, 0].astype(np.float64) / 2**64


def split(
    spool: Spool,
    groups: Int64[np.ndarray, "D"],
    places: Float64[np.ndarray, "D"],
    fractions: Mapping[str, float],
    ordered: bool = False,
) -> Sides:
    """The side of each document. This is the rule, of which the parts are in the functions below:

    1. Documents of one group (near-duplicates, or one file or folder where that was asked for) stay together.
    2. Each group has a place in [0, 1), the hash of its largest document. Below the test fraction it is test, below
       that and the validation fraction validation, else train.
    3. If validation and test so hold a third of their fraction of the bytes or more, and at most 5 % of all bytes
       beyond it, that is the split. Other fractions or more documents then move no other document.
    4. Else test, then validation take groups in the order of their places, each that brings the share closer to the
       fraction and keeps it within those 5 %. The rest is train: what is too large for the others as well.
    5. If that leaves less than a third of the fraction, the largest documents of train are cut, at a paragraph, line
       or space, and the missing bytes taken from their beginning: `Sides.apart` names those whose parts are apart.
    6. Where validation or test holds fewer than 10 documents, its long ones are stored as parts of a twentieth of the
       split, 1 to 16 KiB: intervals need several, and an evaluation reads whole documents.

    With `ordered` (by time) places alone decide: 3 is left out, and 4 and 5 take one document after the other."""
    sizes = spool.sizes
    _, index = np.unique(groups, return_inverse=True)
    held = np.bincount(index, sizes)
    # The place of a group is that of its largest document, of several the first.
    largest = np.lexsort((-np.arange(len(sizes)), sizes))
    place = np.zeros(len(held))
    place[index[largest]] = places[largest]
    below = {TEST: fractions["test"], VALIDATION: fractions["test"] + fractions["validation"]}
    by_hash = np.where(place < below[TEST], TEST, np.where(place < below[VALIDATION], VALIDATION, TRAIN))
    found = Sides(by_hash[index].astype(np.int8))
    total = int(sizes.sum())
    asked = np.array([0.0, fractions["validation"], fractions["test"]]) * total
    if ordered or not _right(found.shares(sizes) * total, asked, total):
        found = Sides(_filled(place, held, asked, ordered)[index].astype(np.int8))
        _cut_off(found, spool, asked, np.argsort(places if ordered else -sizes, kind="stable"))
    _fill_empty(found, sizes)
    _in_parts(found, spool)
    return found


def _right(held: np.ndarray, asked: np.ndarray, total: int) -> bool:
    return bool(((held >= _LEAST * asked) & (held <= asked + _EXCESS * total))[[VALIDATION, TEST]].all())


def _filled(place: np.ndarray, held: np.ndarray, asked: np.ndarray, ordered: bool) -> Int64[np.ndarray, "G"]:
    """Rule 4: the side of each group."""
    side = np.zeros(len(place), np.int64)
    left = np.argsort(place, kind="stable").tolist()
    for wanted in (TEST, VALIDATION):
        taken, stay = 0.0, []
        for at, group in enumerate(left):
            new = taken + held[group]
            closer = abs(new - asked[wanted]) <= abs(taken - asked[wanted])
            if closer and new <= asked[wanted] + _EXCESS * held.sum() and len(left) - len(stay) > 1:
                side[group], taken = wanted, new
            else:
                stay.append(group)
                if ordered or taken >= asked[wanted]:
                    stay += left[at + 1 :]
                    break
        left = stay
    return side


def _cut_off(sides: Sides, spool: Spool, asked: np.ndarray, donors: np.ndarray) -> None:
    """Rule 5."""
    sizes = spool.sizes
    rest: dict[int, int] = {}
    for wanted in (TEST, VALIDATION):
        need = asked[wanted] - sides.shares(sizes)[wanted] * sizes.sum()
        if need <= (1 - _LEAST) * asked[wanted]:
            continue
        for donor in (int(d) for d in donors if sides.of[d] == TRAIN):
            start = rest.get(donor, 0)
            if need < 0.05 * asked[wanted] or need < 1:
                break
            end = _near(spool, donor, start, start + int(min(np.ceil(need), (sizes[donor] - start) // 2)))
            if end > start:
                sides.parts.setdefault(donor, []).append((start, end, wanted))
                rest[donor] = end
                need -= end - start
    for donor, end in rest.items():
        sides.parts[donor].append((end, int(sizes[donor]), TRAIN))


def _near(spool: Spool, document: int, start: int, at: int) -> int:
    """Where to cut a document near byte `at`, after `start`: after a paragraph, line or space if there is one within a
    tenth of the way, else between two characters."""
    slack = max(16, (at - start) // 10)
    first = max(start + 1, at - slack)
    raw = spool.raw(document, first, min(at + slack, int(spool.sizes[document]) - 1))
    middle = max(0, at - first)
    for mark in (b"\n\n", b"\n", b" "):
        before, after = raw.rfind(mark, 0, middle + 1), raw.find(mark, middle)
        ends = [first + found + len(mark) for found in (before, after) if found >= 0]
        if ends:
            return min(ends, key=lambda end: abs(end - at))
    starts = [first + i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80]
    return min(starts, key=lambda place: abs(place - at), default=start)


def _fill_empty(sides: Sides, sizes: np.ndarray) -> None:
    """A side without any document gets the smallest whole one of the side that has the most."""
    for wanted in (TEST, VALIDATION, TRAIN):
        if not sides.counts()[wanted]:
            donor = int(sides.counts().argmax())
            whole = [i for i in np.flatnonzero(sides.of == donor).tolist() if i not in sides.parts]
            if len(whole) > 1 or (whole and sides.counts()[donor] > 1):
                sides.of[min(whole, key=lambda i: int(sizes[i]))] = wanted


def _in_parts(sides: Sides, spool: Spool) -> None:
    """Rule 6."""
    sizes = spool.sizes
    counts, shares = sides.counts(), sides.shares(sizes)
    for side in (VALIDATION, TEST):
        if counts[side] >= _FEW:
            continue
        part = int(np.clip(shares[side] * sizes.sum() / _PARTS, *_PART_BYTES))
        for document in np.flatnonzero(sides.of == side).tolist():
            if document not in sides.parts and sizes[document] > 2 * part:
                sides.parts[document] = [(0, int(sizes[document]), side)]
        for document, parts in sides.parts.items():
            cut = [_even(spool, document, *piece, part) if piece[2] == side else [piece] for piece in parts]
            sides.parts[document] = [piece for several in cut for piece in several]


def _even(spool: Spool, document: int, start: int, end: int, side: int, part: int) -> list[tuple[int, int, int]]:
    cut = []
    while end - start > 2 * part:
        place = _near(spool, document, start, start + part)
        cut.append((start, place, side))
        start = place
    return [*cut, (start, end, side)]


def warnings(sides: Sides, sizes: Int64[np.ndarray, "D"], fractions: Mapping[str, float]) -> list[str]:
    """What to say of a split that is not what was asked for, a line each."""
    said = []
    if apart := sides.apart:
        names = "1 document is" if len(apart) == 1 else f"{len(apart)} documents are"
        said.append(f"{names} cut between training and held-out text, as whole ones are too large; give more documents")
    for name, share in zip(SPLITS, sides.shares(sizes), strict=True):
        if name in fractions and abs(share - fractions[name]) > _EXCESS + 1e-9:
            said.append(f"{name} holds {share:.1%} of the bytes where {fractions[name]:.1%} was asked for")
    return said
