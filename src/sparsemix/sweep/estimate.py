"""What a study will take: runs, FLOPs, epochs, and the time and memory that a few measured steps of each arm tell."""

from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparsemix.data import Shards
from sparsemix.report.numbers import duration, si
from sparsemix.settings import RunConfig
from sparsemix.sweep.arms import Arm
from sparsemix.sweep.grid import Ladders, folded
from sparsemix.sweep.jobs import measured, probe_job
from sparsemix.sweep.ladder import TOKENS_PER_MAC, Rung, predicted
from sparsemix.sweep.launch import Launcher
from sparsemix.sweep.texts import evaluated_tokens

PROBE_STEPS = 20
# Steps' worth of time for a model to be built, saved and read.
OVERHEAD_STEPS = 16
# Repeating a text up to about four times costs little; beyond, no verdict is given (arXiv:2305.16264).
MANY_EPOCHS = 4.0


class Probe(NamedTuple):
    """Some steps of a run, measured. token_s: of evaluation."""

    step_flops: float
    step_s: float
    token_s: float
    peak_bytes: int


class Planned(NamedTuple):
    """One size of an arm at a budget, and what a run of it takes."""

    arm: str
    budget: float
    rung: Rung
    epochs: float
    seconds: float
    peak_bytes: float


def measure(config: RunConfig, data: Path, steps: int) -> Probe:
    """In a worker: a few steps of a run."""
    from sparsemix.evaluate.memory import PeakMemory

    peak = PeakMemory()
    step_s, token_s = probe_job(config, data, steps)
    return Probe(config.step_flops, step_s, token_s, peak.bytes())


def between(low: Probe, high: Probe, step_flops: float) -> Probe:
    """What steps of other cost take: each quantity a power of the FLOPs, through two that were measured."""
    span = log(high.step_flops / low.step_flops) if high.step_flops > low.step_flops else 1.0
    share = log(step_flops / low.step_flops) / span
    step_s, token_s, peak = (exp(log(a) + share * log(b / a)) for a, b in zip(low[1:], high[1:], strict=True))
    return Probe(step_flops, step_s, token_s, round(peak))


def planned(
    arms: Sequence[Arm], ladders: Ladders, shards: Shards, data: Path, launcher: Launcher, steps: int = PROBE_STEPS
) -> list[Planned]:
    """Every size that the study begins with. Trains some steps of each arm at its smallest and its largest size.
    Raises what a probe raises."""
    grid = ladders.grid
    cells = [(arm, budget, r) for arm in arms for budget in sorted(grid.budgets) for r in ladders.first(arm, budget)]
    ends: list[tuple[Arm, Rung]] = []
    for arm in arms:
        sizes = sorted((r for a, _, r in cells if a is arm), key=lambda r: r.forward_flops)
        ends += [(arm, sizes[0]), (arm, sizes[-1])]
    configs = [grid.config(arm, r.size, ladders.data, max(grid.budgets)) for arm, r in ends]
    probes: dict[int, Probe] = {}
    for i, outcome in launcher.map(measure, [(config, data, steps) for config in configs], lambda: None):
        probes[i] = measured(outcome, f"{ends[i][0].name} at its {'largest' if i % 2 else 'smallest'} size")
    found = []
    for arm, budget, r in cells:
        i = next(i for i, (a, _) in enumerate(ends) if a is arm)
        probe = between(probes[i], probes[i + 1], r.step_flops)
        evaluated = evaluated_tokens(configs[i], shards)
        seconds = (r.steps(budget) + OVERHEAD_STEPS) * probe.step_s + evaluated * probe.token_s
        epoch = shards.num_windows(configs[i].model.seq_len) * configs[i].model.seq_len
        found.append(Planned(arm.name, budget, r, r.tokens(budget) / epoch, seconds, probe.peak_bytes))
    return found


def table(cells: Sequence[Planned], ladders: Ladders, workers: int) -> Group:
    """The plan: a row a size, totals, how sizes and rates are chosen, and what to doubt."""
    shown = Table(title="Plan: one run of every size")
    for name in ("kind", "budget", "size", "params", "FLOPs/token", "steps", "tokens", "epochs", "time", "memory"):
        shown.add_column(name, justify="left" if name == "kind" else "right")
    before = cells[0]
    for cell in cells:
        if (cell.arm, cell.budget) != (before.arm, before.budget):
            shown.add_section()
        before, r = cell, cell.rung
        mark = " !!" if cell.epochs > MANY_EPOCHS else " !" if cell.epochs > 1 else ""
        shown.add_row(
            cell.arm,
            f"{cell.budget:.3g}",
            str(r.size),
            si(r.params),
            si(r.forward_flops),
            str(r.steps(cell.budget)),
            si(r.tokens(cell.budget)),
            f"{cell.epochs:.2g}{mark}",
            duration(cell.seconds),
            si(cell.peak_bytes, "B"),
        )
    return Group(shown, *map(Text, totals(cells, ladders, workers)), *_warnings(cells, ladders))


def totals(cells: Sequence[Planned], ladders: Ladders, workers: int) -> list[str]:
    """Runs, FLOPs and time in all, and the rules that the plan was made by."""
    grid, arms = ladders.grid, len({cell.arm for cell in cells})
    groups: dict[tuple[str, float], list[Planned]] = {}
    for cell in cells:
        groups.setdefault((cell.arm, cell.budget), []).append(cell)
    middles = [sorted(group, key=lambda c: c.seconds)[len(group) // 2] for group in groups.values()]
    rates = 3 * arms if grid.rates == "sweep" else 0
    first, more = grid.size_seeds, grid.seeds - grid.size_seeds
    flops = first * sum(c.budget for c in cells) + more * sum(c.budget for c in middles)
    flops += rates * min(grid.budgets)
    seconds = first * sum(c.seconds for c in cells) + more * sum(c.seconds for c in middles)
    seconds += 3 * sum(c.seconds for c in middles if rates and c.budget == min(grid.budgets))
    sized, seeds = first * len(cells), more * len(groups)
    parts = [f"{sized} runs of {'one seed' if first == 1 else f'{first} seeds'}"]
    parts += [f"{seeds} of other seeds at the optima"] if seeds else []
    parts += [f"at least {rates} for learning rates"] if rates else []
    lines = [
        f"{', '.join(parts)}: {sized + seeds + rates} runs, {flops:.3g} FLOPs, about "
        f"{duration(seconds / workers)} with {workers} at a time; more where an optimum is not bracketed"
    ]
    if grid.sizes is None:
        at = ", ".join(f"{predicted(budget):.3g} FLOPs a token at {budget:.3g}" for budget in sorted(grid.budgets))
        lines.append(
            f"sizes: {grid.num_sizes} around {TOKENS_PER_MAC:g} training tokens per multiply-add of a forward pass "
            f"({at}); an optimum that was found moves those of the next budget"
        )
    rule = {
        "rule": "learning rate: 0.01 (64 / width)^1.5, 0.01 below width 64",
        "sweep": "learning rate: the rule (0.01 (64 / width)^1.5, 0.01 below width 64) times a factor of "
        "each kind's own, by validation loss at the smallest budget",
    }
    return [*lines, rule.get(grid.rates, f"learning rate: {grid.rates}")]


def _warnings(cells: Sequence[Planned], ladders: Ladders) -> list[Text]:
    found = [*ladders.skipped, *folded(ladders)]
    more, many = sum(c.epochs > 1 for c in cells), sum(c.epochs > MANY_EPOCHS for c in cells)
    if more:
        found.append(f"{more} of {len(cells)} sizes read the training text more than once (!): give more text")
    if many:
        found.append(
            f"{many} read it more than {MANY_EPOCHS:g} times (!!): no verdict is given there without --allow-repeats"
        )
    return [Text(f"warning: {line}", style="yellow") for line in found]
