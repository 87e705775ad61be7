"""What a reproduction is: the runs that a table or figure of a paper needs, and what is said of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from sparsemix.report.figures import Shape
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.sweep.arms import Arm

Verdict = Literal["reproduced", "not reproduced", "not resolved at this scale"]


class Scale(NamedTuple):
    """How large: the size of the papers' recipes, training FLOPs a run, budgets and sizes of isoFLOP curves (None: the
    ladder around the predicted optimum), seeds, and settings that follow from the budget."""

    name: str
    size: str
    budget: float
    budgets: tuple[float, ...]
    sizes: tuple[int | str, ...] | None
    seeds: int
    overrides: tuple[str, ...] = ()


# Steps of 512 tokens: at these budgets more, smaller steps reach further (docs/LOG.md).
SHORT = ("train.batch_tokens=512", "train.test_tokens=40000")
SCALES = {
    # The family has nearly bytes as tokens at this size, which read half the text a FLOP: 3.2 bits per byte, not 2.8.
    "demo": Scale("demo", "30k", 3e11, (1e11, 3e11), None, 3, (*SHORT, "model.vocab_size=1024")),
    "laptop": Scale("laptop", "300k", 5e12, (2e12, 6e12), None, 5, SHORT),
    "gpu": Scale("gpu", "30M", 1.1e17, (3e16, 1e17), None, 5),
    "paper": Scale("paper", "paper", 6e18, (6e18, 2e19), None, 1),
}


class Design(NamedTuple):
    """The runs of a reproduction. recipe: the dense backbone's family (`peer-dense`); arms: what is compared, the
    baseline first; grid: every arm on a ladder of sizes at every budget (isoFLOP), else one size with all seeds;
    sweep: each arm at the best learning rate of its own sweep. The rest overrules the scale where it is given;
    sizes_by_budget: the sizes of each budget, where they differ; extend: add sizes until optima are bracketed."""

    recipe: str
    arms: Sequence[Arm]
    grid: bool = False
    sweep: bool = False
    size: str | None = None
    budget: float | None = None
    budgets: tuple[float, ...] | None = None
    sizes: tuple[int | str, ...] | None = None
    seeds: int | None = None
    overrides: tuple[str, ...] = ()
    sizes_by_budget: tuple[tuple[int | str, ...], ...] | None = None
    extend: bool = True


class Trend(NamedTuple):
    """A claim of the paper as a test: what it says, what came out, and the numbers that say so."""

    claim: str
    outcome: Verdict
    evidence: str


class Outcome(NamedTuple):
    """What a reproduction says: tables with the paper's numbers beside ours, figures, trends, notes, and all of it as
    numbers for result.json."""

    tables: Sequence[TextTable]
    trends: Sequence[Trend]
    figures: Sequence[Shape] = ()
    notes: Sequence[str] = ()
    numbers: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Lab:
    """What an outcome is made from: the scale, the study's folder, and the finished runs, by arm in the design's order
    (by seed without a grid; role, budget and size tell them apart with one). `say` gets a line where work is long.
    corpora: the folder of evaluation texts, if one was named (docs/evaluation.md)."""

    scale: Scale
    out: Path
    runs: dict[str, list[Record]]
    say: Callable[[str], None]
    corpora: Path | None = None

    @property
    def data(self) -> Path:
        """The folder of the prepared text."""
        return self.out / "data"

    def all(self) -> list[Record]:
        return [record for records in self.runs.values() for record in records]


class Reproduction(NamedTuple):
    """One table or figure: `design` plans without building a model, `outcome` reads the runs (and may evaluate the
    trained models, keeping what it finds in their folders)."""

    design: Callable[[Scale], Design]
    outcome: Callable[[Lab], Outcome]
