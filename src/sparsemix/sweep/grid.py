"""Which runs an isoFLOP study has: sizes of every arm at every budget, by cost alone. No model is built."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import log
from typing import Any, NamedTuple

from sparsemix.config import ConfigError
from sparsemix.data.shards import DataConfig
from sparsemix.settings import RunConfig
from sparsemix.sweep.arms import Arm, backbone, run_config
from sparsemix.sweep.ladder import TOKENS_PER_MAC, Rung, Size, ladder, predicted, rung, too_small, trainable, widths

# No budget at all is too small for this many FLOPs: it stands for any while only the cost of a step is asked for.
ANY_BUDGET = 1e40
MAX_SKIPPED = 50
# Sizes so many times dearer than the predicted optimum are beyond every extension.
REACH = 300.0


class Grid(NamedTuple):
    """The runs of a study. sizes: widths of the recipe's backbone or names of its sizes, None for `num_sizes` of them
    around the predicted optimum; extend: add widths until the optimum is bracketed; seeds: at an optimum, elsewhere
    `size_seeds`; retries: of a run that fails; rates: `rule`, `sweep` (of every arm, at the smallest budget), or a
    number."""

    recipe: str
    overrides: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    sizes: tuple[Size, ...] | None = None
    num_sizes: int = 5
    seeds: int = 5
    size_seeds: int = 1
    retries: int = 1
    extend: bool = True
    rates: str = "rule"

    def backbone(self, size: Size | None = None) -> dict[str, Any]:
        """Raw settings of the dense recipe at a size. Raises ConfigError."""
        if isinstance(size, str):
            return backbone(f"{self.recipe}:{size}", self.overrides)
        return backbone(self.recipe, self.overrides, size)

    def config(self, arm: Arm, size: Size | None, data: DataConfig, budget: float, seed: int = 0) -> RunConfig:
        """The settings of one run. Raises ConfigError."""
        lr = None if self.rates in ("rule", "sweep") else float(self.rates)
        return run_config(arm, self.backbone(size), data, budget, seed, lr)


class Ladders:
    """The sizes that a grid asks of its arms. `rungs` has all that an arm may be given, `skipped` why others cannot."""

    def __init__(self, arms: Sequence[Arm], grid: Grid, data: DataConfig) -> None:
        """Raises ConfigError, also where a budget is too small for its sizes."""
        self.grid, self.data = grid, data
        self.skipped: list[str] = []
        self.rungs = {arm.name: self._possible(arm) for arm in arms}
        for arm in arms:
            for budget in grid.budgets:
                self._note_small(arm, budget, self.first(arm, budget))

    def first(self, arm: Arm, budget: float, ratio: float = TOKENS_PER_MAC) -> list[Rung]:
        """The sizes to begin with; `ratio` is that of the predicted optimum. Raises ConfigError."""
        rungs, sizes = self.rungs[arm.name], self.grid.sizes
        if sizes is None:
            return ladder(rungs, budget, ratio, self.grid.num_sizes)
        named = [r for r in rungs if r.size in sizes]
        able = trainable(named, budget)
        if len(able) < (least := min(3, len(sizes))):
            raise too_small(named, budget, least)
        return able

    def middle(self, arm: Arm, budget: float) -> Rung:
        """The size of the first ladder that is nearest to the predicted optimum."""
        target = log(predicted(budget))
        return min(self.first(arm, budget), key=lambda r: abs(log(r.forward_flops) - target))

    def _possible(self, arm: Arm) -> list[Rung]:
        """Every size, by its FLOPs: those that were named, or else all widths for which the largest budget pays."""
        sizes = self.grid.sizes or ()
        named = [self._rung(arm, size) for size in sizes]
        if self.grid.sizes is None:
            # At the recipe's own width an error is the user's to mend; at others a kind may not fit.
            self._rung(arm, None)
        found = named + [r for r in self._widths(arm) if r.size not in sizes]
        return sorted(found, key=lambda r: r.forward_flops)

    def _widths(self, arm: Arm) -> Iterator[Rung]:
        if any(isinstance(size, str) for size in self.grid.sizes or ()):
            return
        made, largest = 0, max(self.grid.budgets)
        for width in widths():
            try:
                found = self._rung(arm, width)
            except ConfigError as error:
                self.skipped.append(f"{arm.name} has no width {width}: {error}")
                # A kind that fits nowhere must not be tried without end.
                if len(self.skipped) > MAX_SKIPPED:
                    return
                continue
            # As many as a ladder has, whatever they cost: an error then names a budget that works.
            if made >= self.grid.num_sizes and (
                not trainable([found], largest) or found.forward_flops > REACH * predicted(largest)
            ):
                return
            made += 1
            yield found

    def _rung(self, arm: Arm, size: Size | None) -> Rung:
        return rung(size or 0, self.grid.config(arm, size, self.data, ANY_BUDGET))

    def _note_small(self, arm: Arm, budget: float, able: list[Rung]) -> None:
        for size in self.grid.sizes or ():
            if size not in (r.size for r in able):
                self.skipped.append(f"{arm.name} at {budget:.3g} FLOPs has no size {size}: too few steps")


def folded(ladders: Ladders) -> list[str]:
    """Arms whose parameters do not grow with their FLOPs, which a curve against parameters would draw folded."""
    warnings = []
    for name, rungs in ladders.rungs.items():
        for small, large in pairwise(rungs):
            if large.params < small.params:
                warnings.append(
                    f"{name} has {small.params / 1e6:.2f} M parameters at size {small.size} and "
                    f"{large.params / 1e6:.2f} M at {large.size}: read its curves by FLOPs, not by parameters"
                )
                break
    return warnings
