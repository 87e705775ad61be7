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
# No document is cut for fewer bytes than these.
_CUT = 1 << 10


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


def uniform(hashes: UInt8[np.ndarray, "D 32"]) -> Float64[np.ndarray, "D"]:
    """A number in [0, 1) for each hash, from its first 8 bytes."""
    return hashes[:, :8].copy().view(">u8")[:, 0].astype(np.float64) / 2**64


def split(
    spool: Spool,
    groups: Int64[np.ndarray, "D"],
    places: Float64[np.ndarray, "D"],
    fractions: Mapping[str, float],
    ordered: bool = False,
    cut: bool = True,
) -> Sides:
    """The side of each of three or more documents; no side stays empty. This is the rule:

    1. Documents of one group (near-duplicates, or one file or folder where that was asked for) stay together; of fewer
       than three groups nothing can.
    2. Each group has a place in [0, 1), the hash of its largest document. Below the test fraction it is test, below
       that and the validation fraction validation, else train.
    3. If validation and test so hold a third of their fraction of the bytes or more, and exceed it by half of it or 5 %
       of all bytes at most, that is the split. Other fractions or more documents then move no other document.
    4. Else test, then validation take groups in the order of their places, each that brings the share closer to the
       fraction and no further beyond it. The rest is train: what is too large for the others as well.
    5. If that leaves less than a third of the fraction, the largest documents of train are cut, at a paragraph, line
       or space, and the missing bytes taken from their end: `Sides.apart` names those whose parts are apart. Without
       `cut`, or for a fraction that is below 1 KiB, the smallest group stands in for none.

    With `ordered` (by time) places alone decide: 3 is left out, and 4 and 5 take one document after the other."""
    sizes, total = spool.sizes, int(spool.sizes.sum())
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < len(SPLITS):
        index = np.arange(len(sizes))
    held = np.bincount(index, sizes)
    # The place of a group is that of its largest document, of several the first.
    largest = np.lexsort((-np.arange(len(sizes)), sizes))
    place = np.zeros(len(held))
    place[index[largest]] = places[largest]
    below = {TEST: fractions["test"], VALIDATION: fractions["test"] + fractions["validation"]}
    by_hash = np.where(place < below[TEST], TEST, np.where(place < below[VALIDATION], VALIDATION, TRAIN))
    found = Sides(by_hash[index].astype(np.int8))
    asked = np.array([0.0, fractions["validation"], fractions["test"]]) * total
    most = asked + np.maximum(_EXCESS * total, asked / 2)
    if ordered or not _right(found.shares(sizes) * total, asked, most):
        cuts = (asked >= _CUT) & cut
        found = Sides(_filled(place, held, asked, most, cuts, ordered)[index].astype(np.int8))
        _cut_off(found, spool, asked * cuts, np.argsort(places if ordered else -sizes, kind="stable"))
    return found


def _right(held: np.ndarray, asked: np.ndarray, most: np.ndarray) -> bool:
    return bool(((held >= _LEAST * asked) & (held <= most))[[VALIDATION, TEST]].all() and held[TRAIN])


def _filled(
    place: np.ndarray, held: np.ndarray, asked: np.ndarray, most: np.ndarray, cuts: np.ndarray, ordered: bool
) -> Int64[np.ndarray, "G"]:
    """Rule 4: the side of each of three or more groups."""
    side = np.zeros(len(place), np.int64)
    left = np.argsort(place, kind="stable").tolist()
    for wanted, spared in ((TEST, 2), (VALIDATION, 1)):
        taken, stay = 0.0, []
        for at, group in enumerate(left):
            new = taken + held[group]
            closer = abs(new - asked[wanted]) <= abs(taken - asked[wanted])
            if closer and new <= most[wanted] and len(left) - at + len(stay) > spared:
                side[group], taken = wanted, new
            else:
                stay.append(group)
                if ordered or taken >= asked[wanted]:
                    stay += left[at + 1 :]
                    break
        if not taken and not cuts[wanted]:
            first = stay[0] if ordered else min(stay, key=lambda group: float(held[group]))
            side[first] = wanted
            stay.remove(first)
        left = stay
    return side


def _cut_off(sides: Sides, spool: Spool, asked: np.ndarray, donors: np.ndarray) -> None:
    """Rule 5."""
    sizes = spool.sizes
    rest: dict[int, int] = {}
    for wanted in (TEST, VALIDATION):
        need = asked[wanted] - sides.shares(sizes)[wanted] * sizes.sum()
        if need <= (1 - _LEAST) * asked[wanted] or not asked[wanted]:
            continue
        for donor in (int(d) for d in donors if sides.of[d] == TRAIN):
            end = rest.get(donor, int(sizes[donor]))
            if need < 0.05 * asked[wanted] or need < 1:
                break
            start = _near(spool, donor, end, end - int(min(np.ceil(need), end // 2)))
            if start < end:
                sides.parts.setdefault(donor, []).insert(0, (start, end, wanted))
                rest[donor] = start
                need -= end - start
    for donor, end in rest.items():
        sides.parts[donor].insert(0, (0, end, TRAIN))


def _near(spool: Spool, document: int, end: int, at: int) -> int:
    """Where to cut a document near byte `at`, before `end`: after a paragraph, line or space if there is one within a
    tenth of the way, else between two characters; `end` if there is no such place."""
    slack = max(16, (end - at) // 10)
    first = max(1, at - slack)
    raw = spool.raw(document, first, min(at + slack, end - 1))
    middle = max(0, at - first)
    for mark in (b"\n\n", b"\n", b" "):
        before, after = raw.rfind(mark, 0, middle + 1), raw.find(mark, middle)
        ends = [first + found + len(mark) for found in (before, after) if found >= 0]
        if ends:
            return min(ends, key=lambda place: abs(place - at))
    starts = [first + i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80]
    return min(starts, key=lambda place: abs(place - at), default=end)


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
