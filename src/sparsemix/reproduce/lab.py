"""`sparsemix reproduce`: from a name and a scale to runs, and from runs to what is said."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from sparsemix.config import Config, ConfigError
from sparsemix.data.shards import DataConfig
from sparsemix.recipes import settings_of, sizes_of
from sparsemix.report.held_out import found_in_train
from sparsemix.report.records import Record
from sparsemix.reproduce.base import SCALES, Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import Entry, entry
from sparsemix.sweep import texts
from sparsemix.sweep.arms import backbone, refuse_decided, run_config
from sparsemix.sweep.isoflop import Grid, planned_cells, run_grid, run_seeds
from sparsemix.sweep.study import Cell, Study

# What the reproductions decide themselves, and by what.
DECIDED = {
    "train.budget_flops": "--budget",
    "train.lr": "each reproduction's own rate",
    "seed": "--seeds",
    "data.text": "--text",
}


class ReproduceConfig(Config):
    """What the reproductions of one folder share, so that they share runs: the text, the scale, and settings that
    overrule both."""

    text: tuple[str, ...] = ("stdlib",)
    scale: Literal["demo", "laptop", "gpu", "paper"] = "demo"
    budget: float | None = Field(default=None, gt=0)
    seeds: int | None = Field(default=None, ge=1)
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _rules(self) -> "ReproduceConfig":
        refuse_decided(self.overrides, DECIDED)
        return self


class Plan(NamedTuple):
    """A reproduction before it runs: its entry, module, scale, design and the runs as far as cost alone tells them."""

    entry: Entry
    made_by: Reproduction
    scale: Scale
    design: Design
    cells: Sequence[Cell]

    @property
    def flops(self) -> float:
        """Training FLOPs of the planned runs and trials; runs of equal settings count once."""
        budgets = {cell.run: cell.config.train.budget_flops for cell in self.cells}
        return sum(budgets.values()) + self.trials * min(budgets.values())

    @property
    def trials(self) -> int:
        """The least number of runs that only try learning rates: of three an arm, one is among the planned."""
        return 2 * len(self.design.arms) if self.design.sweep else 0


def reproduction(name: str) -> Reproduction:
    """The module's REPRODUCTIONS entry of a name. Raises ConfigError on an unknown name."""
    module = importlib.import_module(f"sparsemix.reproduce.{entry(name).module}")
    return module.REPRODUCTIONS[name]


def plan(name: str, settings: ReproduceConfig, data: DataConfig | None = None) -> Plan:
    """What a name needs at a scale, from cost alone. Raises ConfigError."""
    scale = SCALES[settings.scale]
    if settings.budget is not None:
        # Curves keep their distance from the budget.
        ratio = settings.budget / scale.budget
        scale = scale._replace(budget=settings.budget, budgets=tuple(b * ratio for b in scale.budgets))
    scale = scale._replace(seeds=settings.seeds or scale.seeds, overrides=(*scale.overrides, *settings.overrides))
    made_by = reproduction(name)
    design = _filled(made_by.design(scale), scale, settings.overrides)
    data = data or data_config(design, settings)
    if design.grid:
        cells = [cell for grid in _grids(design) for cell in planned_cells(design.arms, grid, data)]
    else:
        raw = backbone(_recipe(design), design.overrides)
        cells = [
            Cell(arm.name, run_config(arm, raw, data, design.budget or scale.budget, seed))
            for seed in range(design.seeds or scale.seeds)
            for arm in design.arms
        ]
    return Plan(entry(name), made_by, scale, design, cells)


def data_config(design: Design, settings: ReproduceConfig) -> DataConfig:
    """The text at the vocabulary of the design's recipe; at paper scale the recipe's own text, unless one is given."""
    own = settings_of(_recipe(design), design.overrides).get("data", {})
    text = settings.text if settings.text != ("stdlib",) or "text" not in own else tuple(own["text"])
    return texts.data_config(_recipe(design), design.overrides, text)


def run(
    planned: Plan,
    study: Study,
    launcher: Any,
    say: Callable[[str], None],
    retries: int = 1,
    corpora: Path | None = None,
) -> tuple[Outcome, list[Record]]:
    """Train what is left of the plan; what is said of it, and the runs. corpora: the folder of evaluation texts, for
    what asks for them. Raises ConfigError and KeyboardInterrupt."""
    design, scale = planned.design, planned.scale
    if design.grid:
        grids = [run_grid(study, design.arms, grid, launcher) for grid in _grids(design)]
        records: list[Record | None] = [record for found in grids for record in found]
    elif design.sweep:
        records = list(run_seeds(study, design.arms, _grid(design), launcher))
    else:
        records = study.train(planned.cells, launcher, planned.entry.name, retries)
    runs: dict[str, list[Record]] = {arm.name: [] for arm in design.arms}
    for record in records:
        if record is not None:
            runs[record.arm].append(record)
    if empty := [arm for arm, found in runs.items() if not found]:
        raise ConfigError(f"{planned.entry.name}: no run of {', '.join(empty)} finished; the lines above say why")
    lab = Lab(scale, study.out, runs, say, corpora=corpora)
    outcome = planned.made_by.outcome(lab)
    text = study.shards.manifest
    notes = (f"Text: {found_in_train(text.get('contamination'))}.", *text.get("warnings", ()))
    return outcome._replace(notes=(*outcome.notes, *notes)), lab.all()


def _filled(design: Design, scale: Scale, asked: tuple[str, ...]) -> Design:
    """The scale's values where the design gives none; what the user asked for overrules both."""
    size = design.size or scale.size
    known = sizes_of(design.recipe)
    if known and size not in known:
        raise ConfigError(f"scale={scale.name}: {design.recipe} has no size {size}, only {', '.join(known)}")
    return design._replace(
        size=size,
        budget=design.budget or scale.budget,
        budgets=design.budgets or scale.budgets,
        sizes=design.sizes or scale.sizes,
        seeds=design.seeds or scale.seeds,
        overrides=(*scale.overrides, *design.overrides, *asked),
    )


def _recipe(design: Design) -> str:
    return f"{design.recipe}:{design.size}" if design.size else design.recipe


def _grids(design: Design) -> list[Grid]:
    """One grid, or one for each budget where each has its own sizes."""
    if design.sizes_by_budget is None:
        return [_grid(design)]
    budgets = design.budgets or ()
    return [
        _grid(design._replace(budgets=(budget,), sizes=sizes))
        for budget, sizes in zip(budgets, design.sizes_by_budget, strict=True)
    ]


def _grid(design: Design) -> Grid:
    # `_filled` has given every value.
    assert design.budget is not None and design.budgets is not None and design.seeds is not None
    budgets = design.budgets if design.grid else (design.budget,)
    # Sizes by name take the place of the design's one size.
    named = any(isinstance(size, str) for size in design.sizes or ())
    return Grid(
        recipe=design.recipe if named else _recipe(design),
        overrides=design.overrides,
        budgets=budgets,
        sizes=design.sizes,
        seeds=design.seeds,
        extend=design.extend,
        rates="sweep" if design.sweep else "rule",
    )
