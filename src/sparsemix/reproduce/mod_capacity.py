"""Capacity of Mixture-of-Depths: how many tokens a routed block takes."""

from collections.abc import Sequence

from sparsemix.report.numbers import fixed
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale, entry
from sparsemix.reproduce.tables import loss_cells
from sparsemix.reproduce.trends import Claim, orderings
from sparsemix.sweep.arms import Arm

CAPACITIES = (0.5, 0.25, 0.125, 0.0625)


def _name(capacity: float) -> str:
    return f"MoD {100 * capacity:g} %"


def design(scale: Scale) -> Design:
    """A dense model and MoD around every other block at each capacity, at one budget: fewer tokens, more steps."""
    arms = [Arm("dense")]
    arms += [Arm(_name(c), "mod", (f"model.blocks.wrap.capacity={c}",)) for c in CAPACITIES]
    return Design("mod-dense", arms, size="1024x14" if scale.name == "paper" else None)


def outcome(lab: Lab) -> Outcome:
    paper = entry("mod-capacity").numbers["loss"]
    rows: list[Sequence[str]] = [[arm, *loss_cells(runs), fixed(paper.get(arm), 2)] for arm, runs in lab.runs.items()]
    columns = ("arm", "bits per byte", "nats per token", "seeds", "FLOPs per token", "paper: loss at 6e18")
    at = lab.runs
    trends = orderings(
        [
            Claim("12.5 % is better than dense", at[_name(0.125)], at["dense"]),
            Claim("12.5 % is better than 50 %", at[_name(0.125)], at[_name(0.5)]),
            Claim("12.5 % is better than 25 %", at[_name(0.125)], at[_name(0.25)]),
            Claim("below 12.5 % it gets worse: 12.5 % is better than 6.25 %", at[_name(0.125)], at[_name(0.0625)]),
        ]
    )
    return Outcome([TextTable("Loss by capacity, every other block routed", columns, rows)], trends)


REPRODUCTIONS = {"mod-capacity": Reproduction(design, outcome)}
