"""Whether a predictor changes what it watches: two runs compared bit by bit."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Trend
from sparsemix.reproduce.trends import exact
from sparsemix.run import Run
from sparsemix.saved import tensors_of

# What one of the runs has and the other lacks, by design.
OWN = ("predictor", "threshold")


class Compared(NamedTuple):
    """Two runs of one seed. steps: logged losses that both have; first_unlike: the first step whose losses differ in
    any bit; tensors: weights that both have, and unlike the names of those that differ; alike: whether both ran with
    the same threads, number type and compilation, without which bits say nothing."""

    seed: int
    steps: int
    first_unlike: int | None
    tensors: int
    unlike: tuple[str, ...]
    alike: bool

    @property
    def identical(self) -> bool:
        return self.steps > 0 and self.first_unlike is None and not self.unlike


def compare_bits(run: Record, other: Record) -> Compared:
    """Losses of every logged step and all weights, but for the predictors' and thresholds'."""
    lines = [list(Run(r.folder).metrics()) for r in (run, other)]
    first = next((a or b for a, b in zip_longest(*lines) if not a or not b or _seen(a) != _seen(b)), None)
    mine, theirs = (tensors_of(r.folder / "model") for r in (run, other))
    trunk = [name for name in mine | theirs if not set(name.split(".")) & set(OWN)]
    unlike = [n for n in trunk if n not in mine or n not in theirs or not mine[n].equal(theirs[n])]
    alike = all(run.result.get(name) == other.result.get(name) for name in ("threads", "dtype", "compiled"))
    steps = min(map(len, lines))
    return Compared(run.seed, steps, first["step"] if first else None, len(trunk), tuple(unlike), alike)


def _seen(line: dict[str, float]) -> tuple[float, float, float]:
    return line["step"], line["loss"], line["grad_norm"]


def identity(words: str, compared: Sequence[Compared]) -> Trend:
    """The claim that every pair is identical."""
    comparable = [pair for pair in compared if pair.alike]
    if not comparable:
        why = "no seed that both finished" if not compared else "the runs used other numbers of threads or number types"
        return Trend(words, "not resolved at this scale", why)
    if unlike := [pair for pair in comparable if not pair.identical]:
        worst = unlike[0]
        said = f"seed {worst.seed}: losses differ from step {worst.first_unlike} on, {len(worst.unlike)} weights differ"
        return exact(words, False, said)
    losses, tensors = sum(pair.steps for pair in comparable), sum(pair.tensors for pair in comparable)
    return exact(words, True, f"{losses} losses and {tensors} weight tensors of {len(comparable)} seeds, bit by bit")


def identity_table(compared: Sequence[Compared]) -> TextTable:
    columns = ("seed", "logged steps", "first step unlike", "weight tensors", "unlike")
    rows = [
        [
            str(p.seed),
            str(p.steps),
            "none" if p.first_unlike is None else str(p.first_unlike),
            str(p.tensors),
            str(len(p.unlike)),
        ]
        for p in compared
    ]
    return TextTable("Losses and weights with and without the predictor, bit by bit", columns, rows)
