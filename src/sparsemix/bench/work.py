"""A work is a list of cases; a case runs its contenders in turn and gives numbers, each perhaps with a floor."""

import gc
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from sparsemix.bench.agreement import disagreement
from sparsemix.bench.floors import FLOORS
from sparsemix.bench.timing import interleave

Probe = Callable[[], Mapping[str, Tensor]]
OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """`run` is timed. `probe` gives its outputs and gradients, `moved` how far some optimizer steps move its
    parameters, both perhaps at a smaller size; without a probe there is no ratio that needs equality."""

    run: Callable[[], object]
    probe: Probe | None = None
    moved: Probe | None = None


@dataclass(frozen=True)
class Number:
    """factor * (seconds of the fastest of `others`) / (seconds of `first`).

    With `same` they must agree. Without, they are not the same function, or a ceiling, and `what` says so."""

    id: str
    what: str
    others: tuple[str, ...]
    first: str = OURS
    factor: float = 1.0
    same: bool = True

    def row(self, seconds: Mapping[str, float], said: Mapping[str, str]) -> dict[str, Any]:
        """The number with its floor; refused where a contender disagrees or none of the others ran."""
        ran = {name: seconds[name] for name in self.others if name in seconds}
        wrong = [name for name in self.others if name in ran and said[name] != "ok"] if self.same else []
        absent = [] if ran and self.first in seconds else [n for n in (self.first, *self.others) if n not in seconds]
        if wrong or absent:
            return number_row(self.id, self.what, None, "; ".join(f"{n}: {said[n]}" for n in wrong or absent))
        best = min(ran, key=lambda name: ran[name])
        value = self.factor * ran[best] / seconds[self.first]
        return number_row(self.id, self.what.replace("{best}", best), value)


ABSENT = "not available"


class Unavailable(Exception):
    """A contender that cannot be had here: what is missing, and the way to it."""


def number_row(id: str, what: str, value: float | None, refused: str | None = None) -> dict[str, Any]:
    """A number as it is stored: with its floor and goal, and whether the floor is met."""
    floor = FLOORS.get(id)
    row = {"id": id, "what": what, "value": value, "refused": refused}
    if floor is None:
        return row
    met = None if value is None else floor.met(value)
    return {**row, "floor": floor.least, "goal": floor.goal, "at_most": floor.at_most, "met": met}


class Measurable(Protocol):
    """What a work is made of: the harness shows the name and keeps what `measure` gives."""

    @property
    def name(self) -> str: ...
    def measure(self, quick: bool) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Case:
    """Contenders by name, each built when its turn comes. `amounts` says what ours needs of each ceiling at least
    (bytes or FLOPs a call); `gib` how much free memory the case needs."""

    name: str
    contenders: Mapping[str, Callable[[], Contender]]
    numbers: Sequence[Number]
    settings: Mapping[str, Any] = field(default_factory=dict)
    amounts: Mapping[str, float] = field(default_factory=dict)
    budget_s: float = 5.0
    tolerance: float = 1e-4
    gib: float = 0.0

    def measure(self, quick: bool) -> dict[str, Any]:
        """The case's times and numbers, as they are stored."""
        about = {"name": self.name, "settings": dict(self.settings), "amounts": dict(self.amounts)}
        if (free := free_gib()) < self.gib:
            why = f"{ABSENT}: needs {self.gib:.0f} GiB of free memory, here are {free:.0f}"
            said = dict.fromkeys(self.contenders, why)
            return about | {"contenders": {n: {"said": why} for n in said}, "numbers": self.rows({}, said)}
        built, said = self.build()
        said |= self.compare(built)
        times = interleave({n: c.run for n, c in built.items()}, self.budget_s / 10 if quick else self.budget_s)
        rows = {n: {"said": said[n]} | (times[n]._asdict() if n in times else {}) for n in said}
        del built
        gc.collect()
        return about | {"contenders": rows, "numbers": self.rows({n: t.min_s for n, t in times.items()}, said)}

    def rows(self, seconds: Mapping[str, float], said: Mapping[str, str]) -> list[dict[str, Any]]:
        return [number.row(seconds, said) for number in self.numbers]

    def build(self) -> tuple[dict[str, Contender], dict[str, str]]:
        """The contenders that can be had, and why the others cannot."""
        built: dict[str, Contender] = {}
        said: dict[str, str] = {}
        for name, build in self.contenders.items():
            try:
                built[name] = build()
            except Unavailable as error:
                said[name] = f"{ABSENT}: {error}"
        return built, said

    def compare(self, built: Mapping[str, Contender]) -> dict[str, str]:
        """Per contender `ok`, or how it disagrees with ours."""
        ours = built[OURS]
        said = {OURS: "ok"}
        for kind, tolerance in (("probe", self.tolerance), ("moved", max(1e-2, self.tolerance))):
            mine = None
            for name, contender in built.items():
                probe = getattr(contender, kind)
                if name == OURS or probe is None or said.get(name, "ok") != "ok":
                    continue
                if mine is None:
                    expected = getattr(ours, kind)
                    assert expected is not None, f"{self.name}: ours has no {kind} to compare with"
                    mine = expected()
                said[name] = disagreement(mine, probe(), tolerance) or "ok"
        needs = {name for number in self.numbers if number.same for name in number.others}
        unproved = [name for name in built if name in needs and built[name].probe is None]
        assert not unproved, f"{self.name}: a ratio needs a probe of {', '.join(unproved)}"
        return {name: said.get(name, "not the same function") for name in built}


def free_gib() -> float:
    """Memory that can be had without swapping."""
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) / 2**20
    except (OSError, StopIteration):
        return os.sysconf(names[0]) * os.sysconf(names[1]) / 2**30 if names[0] in os.sysconf_names else float("inf")


@dataclass(frozen=True)
class Work:
    """One row of the list of works. `cases(quick)` yields them one by one, so that only one is in memory."""

    name: str
    about: str
    cases: Callable[[bool], Iterable[Measurable]]
    floors: tuple[str, ...] = ()
