"""The four models that the paper's Figure 3 points at, and how fast they step when they take turns."""

from collections.abc import Sequence
from math import log
from statistics import fmean
from typing import Any, NamedTuple

from sparsemix.config import parse
from sparsemix.report.figures import Bars
from sparsemix.report.numbers import DASH, fixed, si
from sparsemix.report.optimum import Runs
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Lab
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mod_arms import DENSE, MOD
from sparsemix.reproduce.mod_curves import Analysis, at_optimum, curve_of, reference, sizes_at, within
from sparsemix.reproduce.mod_speed import Speed, step_times
from sparsemix.settings import RunConfig


class Callouts(NamedTuple):
    """faster: steps per second of the equal-loss pair, MoD over dense, and its interval; (None, None) where no MoD
    reached that loss, which `missing` says."""

    table: TextTable
    figures: Sequence[Bars]
    faster: tuple[float | None, list[float] | None]
    missing: str
    notes: Sequence[str]
    numbers: dict[str, Any]


def callouts(lab: Lab, analysis: Analysis, budget: float) -> Callouts:
    """#1 the dense model next to its optimum, #2 a dense one of about the MoD optimum's parameters, #3 the MoD with the
    fewest FLOPs per token that reaches the dense optimum's loss, or else that of about its parameters, #4 the MoD next
    to its optimum; the speed of all by turns."""
    models, reached = _chosen(lab, analysis, budget)
    configs = {name: parse(RunConfig, runs[0].settings) for name, runs in models.items()}
    speed = step_times(lab, configs)
    flops = {name: config.step_flops for name, config in configs.items()}
    rate = {name: 1 / speed.median(name) for name in configs}
    slower, ends = speed.ratio("#1", "#3")
    shown = {
        "flops-per-step": ("FLOPs of a training step", "FLOPs per step (% of #1)", flops),
        "steps-per-second": ("Training steps per second", "steps per second (% of #1)", rate),
    }
    bars = [
        Bars(id, title, "call-out", list(values.values()), 1, list(values), y_label=label, total=values["#1"])
        for id, (title, label, values) in shown.items()
    ]
    missing = "" if reached else "no MoD that was run reaches the dense optimum's loss"
    notes = [
        "#3 is the cheapest MoD that was run whose loss is at most that of the dense optimum."
        if reached
        else f"{missing}: #3 is the MoD nearest in parameters to #1.",
    ]
    numbers = {
        name: {"params": models[name][0].params, "flops_per_step": flops[name], "steps_per_s": rate[name]}
        for name in models
    }
    table = _table(models, flops, speed)
    return Callouts(table, bars, (slower, ends) if reached else (None, None), missing, notes, numbers)


def _chosen(lab: Lab, analysis: Analysis, budget: float) -> tuple[dict[str, Runs], bool]:
    """The runs of each call-out, and whether #3 reaches the loss of #1."""
    dense, mod = (sizes_at(lab.runs[arm.name], budget) for arm in (DENSE, MOD))
    first, last = (at_optimum(lab.runs[arm.name], budget) for arm in (DENSE, MOD))
    goal = reference(analysis, budget)[1]
    able = [size for size in mod if fmean(r.nats for r in size) <= goal]
    larger = curve_of(analysis, MOD.name, budget)["optimum"] or {"params": last[0].params}
    cheapest = min(able, key=lambda size: size[0].forward_flops) if able else _nearest(mod, first[0].params)
    return {"#1": first, "#2": _nearest(dense, larger["params"]), "#3": cheapest, "#4": last}, bool(able)


def _nearest(sizes: Sequence[Runs], params: float) -> Runs:
    return min(sizes, key=lambda size: abs(log(size[0].params / params)))


def _table(models: dict[str, Runs], flops: dict[str, float], speed: Speed) -> TextTable:
    rows = []
    for name, runs in models.items():
        paper = entry("mod-fig3").numbers["callouts"][name]
        ratio, ends = speed.ratio("#1", name)
        rows.append(
            [
                name,
                f"{runs[0].arm}, width {runs[0].settings['model']['d_model']}",
                si(runs[0].params),
                fixed(fmean(r.nats for r in runs), 4),
                si(flops[name]),
                fixed(1 / speed.median(name), 2),
                within(ratio, ends, lambda value: fixed(value, 2)),
                f"{paper['model']}, {paper['params']}",
                si(paper["flops_per_step"]),
                fixed(paper["steps_per_s"], 1) if "steps_per_s" in paper else DASH,
            ]
        )
    columns = (
        "call-out", "model", "parameters", "nats", "FLOPs per step", "steps per second", "steps per second over #1's",
        "paper: model", "paper: FLOPs per step", "paper: steps per second",
    )  # fmt: skip
    caption = f"Training steps of the four call-outs, by turns, on {speed.hardware} (paper: TPUv5)"
    return TextTable(caption, columns, rows)
