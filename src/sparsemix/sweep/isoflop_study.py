"""`sparsemix isoflop`: its settings, and its steps from a text to the finished runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from sparsemix.config import Config
from sparsemix.report.records import Record
from sparsemix.sweep.arms import Arm, refuse_decided, refuse_unknown_kinds
from sparsemix.sweep.estimate import Planned, planned
from sparsemix.sweep.grid import Grid, Ladders
from sparsemix.sweep.isoflop import run_grid
from sparsemix.sweep.ladder import Size
from sparsemix.sweep.launch import Launcher
from sparsemix.sweep.phase import working
from sparsemix.sweep.study import Progress, Study
from sparsemix.sweep.texts import data_config, prepared, tell

# What the study decides itself, and the option that it decides it by.
DECIDED = {
    "train.budget_flops": "--budgets",
    "train.lr": "--lr",
    "seed": "--seeds",
    "data.text": "--text",
}


class IsoflopConfig(Config):
    """What to study; a folder holds one study. sizes: null for a ladder around the predicted optimum.

    Depth, heads and feed-forward of the recipe keep their proportion to its width (model.d_model) at every size."""

    budgets: tuple[float, ...] = Field(min_length=1)
    text: tuple[str, ...] = ("stdlib",)
    kinds: tuple[str, ...] = ("dense", "moe", "peer", "mod")
    sizes: tuple[Size, ...] | None = None
    seeds: int = Field(default=5, ge=1)
    size_seeds: int = Field(default=1, ge=1)
    lr: str = "rule"
    placement: Literal["every", "every-2", "middle"] = "middle"
    recipe: str = "tiny"
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _rules(self) -> "IsoflopConfig":
        self.rule(min(self.budgets) > 0, "budgets", "must be positive FLOPs, such as 1e12")
        self.rule(len(set(self.budgets)) == len(self.budgets), "budgets", "must name each budget once")
        self.rule(len(set(self.kinds)) == len(self.kinds) > 0, "kinds", "must name each kind once")
        refuse_unknown_kinds(self.kinds)
        self.rule("dense" in self.kinds, "kinds", "must hold dense, which the others are compared with")
        if self.sizes is not None:
            self.rule(len(set(self.sizes)) == len(self.sizes), "sizes", "must name each size once")
            self.rule(len(self.sizes) >= 3, "sizes", "must name at least 3, for a curve has three coefficients")
            self.rule(len({type(size) for size in self.sizes}) == 1, "sizes", "must be all widths or all names")
        self.rule(self.size_seeds <= self.seeds, "size_seeds", f"must be at most seeds={self.seeds}")
        if self.lr not in ("rule", "sweep"):
            self.rule(_is_positive(self.lr), "lr", "must be a positive number, rule, or sweep")
        refuse_decided(self.overrides, DECIDED)
        return self

    @property
    def grid(self) -> Grid:
        budgets = tuple(sorted(self.budgets))
        seeds, size_seeds = self.seeds, self.size_seeds
        return Grid(self.recipe, self.overrides, budgets, self.sizes, seeds=seeds, size_seeds=size_seeds, rates=self.lr)

    @property
    def arms(self) -> list[Arm]:
        """The kinds, the baseline first."""
        kinds = sorted(self.kinds, key=lambda kind: kind != "dense")
        return [Arm(kind, kind, placement=self.placement) for kind in kinds]


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


class IsoflopStudy:
    """The steps of the command, in their order: the folder and the plan by cost, the text, the estimate, the runs."""

    def __init__(self, settings: IsoflopConfig, out: Path, say: Callable[[str], None], retries: int = 1) -> None:
        """Writes nothing. Raises ConfigError for all that is wrong with the settings or the folder."""
        self.arms, self.grid = settings.arms, settings.grid._replace(retries=retries)
        self.text = data_config(settings.recipe, settings.overrides, settings.text)
        self.ladders = Ladders(self.arms, self.grid, self.text)
        self.study = Study(out, settings, say)

    def prepare(self, progress: Progress | None = None) -> None:
        """The text, once. Raises ConfigError, also where it is too short for a test."""
        study, budget = self.study, max(self.grid.budgets)
        example = self.grid.config(self.arms[0], self.grid.sizes[0] if self.grid.sizes else None, self.text, budget)
        prepared(study.out, lambda: study.prepare(self.text, progress), example)
        tell(study.shards, self.text.text, study.say)
        self.ladders = Ladders(self.arms, self.grid, study.data)

    def plan(self, launcher: Launcher) -> list[Planned]:
        """Every size that the study begins with, and what it takes."""
        self.study.say(f"measuring 20 steps of {len(self.arms)} kinds at their smallest and largest sizes")
        with working(self.study.out) as phase:
            phase("measuring 20 steps of each kind")
            return planned(self.arms, self.ladders, self.study.shards, self.study.out / "data", launcher)

    def run(self, launcher: Launcher) -> list[Record]:
        """What is left of the runs. Raises KeyboardInterrupt with all saved."""
        return run_grid(self.study, self.arms, self.grid, launcher)
