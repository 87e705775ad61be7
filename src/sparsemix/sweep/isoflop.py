"""An isoFLOP study: several sizes of every arm at every budget, and more seeds at each optimum."""

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite, log
from statistics import fmean
from typing import NamedTuple

from sparsemix.data.shards import DataConfig
from sparsemix.report.records import Record
from sparsemix.sweep import rates
from sparsemix.sweep.arms import Arm
from sparsemix.sweep.grid import Grid, Ladders
from sparsemix.sweep.ladder import TOKENS_PER_MAC, Bottom, Rung, Size, bottom, extension, predicted, ratio_of
from sparsemix.sweep.launch import Launcher
from sparsemix.sweep.study import Cell, Study

__all__ = ["Grid", "Optimum", "measured_ratio", "planned_cells", "run_grid", "run_seeds"]

# Sizes that are added to a ladder before its optimum is called out of reach.
MAX_EXTRA = 5


class Optimum(NamedTuple):
    """Where an arm's least validation loss at a budget is, and the trained size next to it."""

    bottom: Bottom
    rung: Rung


def run_grid(study: Study, arms: Sequence[Arm], grid: Grid, launcher: Launcher) -> list[Record]:
    """Every run of the grid that ends: the first seeds at the sizes of each arm and budget, more sizes until the
    optimum by mean validation loss is bracketed, then the other seeds there. Records of role `rate`, `grid`, `seed`.

    The study's text must be prepared. Budgets go from small to large: where an optimum was found it moves the sizes of
    the next budget. A run that fails is said and left out. Raises ConfigError, and KeyboardInterrupt with all saved."""
    records: list[Record] = []
    train = _collecting(study, launcher, grid.retries, records)
    ladders = Ladders(arms, grid, study.data)
    if grid.rates == "sweep":
        smallest = min(grid.budgets)
        arms = _swept(study, arms, grid, {arm: ladders.middle(arm, smallest).size for arm in arms}, train)
    optima: dict[tuple[Arm, float], Optimum] = {}
    for budget in sorted(grid.budgets):
        for arm, optimum in _bracketed(study, arms, ladders, budget, records, train).items():
            optima[arm, budget] = optimum
    others = [
        _cell(grid, arm, optimum.rung.size, study.data, budget, seed)
        for (arm, budget), optimum in optima.items()
        for seed in range(grid.size_seeds, grid.seeds)
    ]
    if others:
        train(others, "seeds")
    return records


def run_seeds(study: Study, arms: Sequence[Arm], grid: Grid, launcher: Launcher) -> list[Record]:
    """Every run that ends of every arm and budget at the recipe's own size, with all seeds; rates as the grid says.
    Seed 0 has the role `grid`. Raises as `run_grid` does."""
    records: list[Record] = []
    train = _collecting(study, launcher, grid.retries, records)
    if grid.rates == "sweep":
        arms = _swept(study, arms, grid, dict.fromkeys(arms), train)
    cells = [
        _cell(grid, arm, None, study.data, budget, seed)
        for budget in sorted(grid.budgets)
        for seed in range(grid.seeds)
        for arm in arms
    ]
    train(cells, "training")
    return records


def planned_cells(arms: Sequence[Arm], grid: Grid, data: DataConfig) -> list[Cell]:
    """The runs that `run_grid` makes if every prediction holds, but for those that try learning rates; by cost alone.
    Raises ConfigError."""
    ladders = Ladders(arms, grid, data)
    cells = []
    for budget in sorted(grid.budgets):
        for arm in arms:
            pairs = [(r.size, seed) for r in ladders.first(arm, budget) for seed in range(grid.size_seeds)]
            size = ladders.middle(arm, budget).size
            pairs += [(size, seed) for seed in range(grid.size_seeds, grid.seeds)]
            cells += [_cell(grid, arm, size, data, budget, seed) for size, seed in pairs]
    return cells


def _cell(grid: Grid, arm: Arm, size: Size | None, data: DataConfig, budget: float, seed: int) -> Cell:
    return Cell(arm.name, grid.config(arm, size, data, budget, seed), "seed" if seed else "grid")


Train = Callable[[Sequence[Cell], str], list[Record | None]]


def _collecting(study: Study, launcher: Launcher, retries: int, records: list[Record]) -> Train:
    """Study.train, which also adds what ends to `records`."""

    def train(cells: Sequence[Cell], title: str) -> list[Record | None]:
        found = study.train(cells, launcher, title, retries)
        records.extend(record for record in found if record is not None)
        return found

    return train


def _swept(study: Study, arms: Sequence[Arm], grid: Grid, sizes: Mapping[Arm, Size | None], train: Train) -> list[Arm]:
    """The arms with their best rate on validation (`rates.vertex`) at a size and the smallest budget, as a multiple of
    the rule's, which then serves every size."""
    budget = min(grid.budgets)
    configs = {arm.name: grid.config(arm, sizes[arm], study.data, budget) for arm in arms}

    def losses(pairs: Sequence[tuple[str, float]]) -> list[float]:
        cells = []
        for name, rate in pairs:
            config = configs[name]
            cells.append(Cell(name, config.replace(train=config.train.replace(lr=rate)), "rate"))
        return [inf if record is None else record.validation_bpb for record in train(cells, "learning rates")]

    tried = rates.sweep({name: config.train.lr for name, config in configs.items()}, losses)
    found = []
    for arm in arms:
        losses_of = tried[arm.name]
        best = rates.vertex(losses_of)
        study.say(f"{arm.name}: learning rate {rates.described(losses_of, best)}, at the smallest budget")
        factor = best / configs[arm.name].train.lr if any(map(isfinite, losses_of.values())) else 1.0
        found.append(arm._replace(rate=arm.rate * factor))
    return found


def _bracketed(
    study: Study, arms: Sequence[Arm], ladders: Ladders, budget: float, before: Sequence[Record], train: Train
) -> dict[Arm, Optimum]:
    """The optimum of every arm that has a run, after its ladder was extended as far as that helps."""
    ratios = {arm: measured_ratio(before, arm.name, budget) for arm in arms}
    todo = {arm: ladders.first(arm, budget, ratios[arm]) for arm in arms}
    limits = {arm: len(rungs) + MAX_EXTRA for arm, rungs in todo.items()}
    tried: dict[Arm, dict[Rung, float]] = {arm: {} for arm in arms}
    while todo:
        runs = [(a, r, seed) for a, rungs in todo.items() for r in rungs for seed in range(ladders.grid.size_seeds)]
        cells = [_cell(ladders.grid, arm, rung.size, study.data, budget, seed) for arm, rung, seed in runs]
        seen: dict[tuple[Arm, Rung], list[float]] = {}
        for (arm, rung, _), record in zip(runs, train(cells, f"{budget:.3g} FLOPs"), strict=True):
            seen.setdefault((arm, rung), []).extend([record.validation_bpb] if record else [])
        for (arm, rung), losses in seen.items():
            tried[arm][rung] = fmean(losses) if losses else inf
        todo = {}
        for arm in arms:
            side = _bottom(tried[arm]).side
            if side and ladders.grid.extend and len(tried[arm]) < limits[arm]:
                beyond = extension(ladders.rungs[arm.name], list(tried[arm]), budget, side)
                todo |= {arm: [beyond]} if beyond else {}
    optima = {}
    for arm, losses in tried.items():
        if not any(map(isfinite, losses.values())):
            study.say(f"{arm.name} at {budget:.3g} FLOPs: no run ended, so there is no optimum")
            continue
        found = _bottom(losses)
        ended = [rung for rung, loss in losses.items() if isfinite(loss)]
        near = min(ended, key=lambda r: abs(log(r.forward_flops / found.forward_flops)))
        optima[arm] = Optimum(found, near)
        _say_optimum(study, arm, budget, optima[arm], predicted(budget, ratios[arm]))
    return optima


def _bottom(losses: dict[Rung, float]) -> Bottom:
    ended = {rung.forward_flops: loss for rung, loss in losses.items() if isfinite(loss)}
    return bottom(ended) if ended else Bottom(0.0, 0)


def _say_optimum(study: Study, arm: Arm, budget: float, optimum: Optimum, prediction: float) -> None:
    at, side = optimum.bottom
    where = f"optimum near {at:.3g} FLOPs a token (predicted {prediction:.3g}), nearest size {optimum.rung.size}"
    if side:
        missing = "smaller" if side < 0 else "larger"
        where = f"best at size {optimum.rung.size}, but the optimum is not bracketed: no {missing} size was tried"
    study.say(f"{arm.name} at {budget:.3g} FLOPs: {where}")


def measured_ratio(records: Sequence[Record], arm: str, budget: float) -> float:
    """Tokens per multiply-add at the arm's optimum at the largest budget below `budget` where runs bracket it, or the
    usual one."""
    for smaller in sorted({r.budget for r in records if r.budget < budget}, reverse=True):
        losses: dict[float, list[float]] = {}
        for r in records:
            if r.arm == arm and r.budget == smaller and r.role != "rate":
                losses.setdefault(r.forward_flops, []).append(r.validation_bpb)
        if losses and (found := bottom({flops: fmean(seeds) for flops, seeds in losses.items()})).side == 0:
            return ratio_of(smaller, found.forward_flops)
    return TOKENS_PER_MAC
