"""Who chooses the tokens of Mixture-of-Depths, and how many a routed block takes."""

from sparsemix.report.figures import Chart, Line
from sparsemix.report.numbers import fixed, percent
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mod_arms import (
    DENSE,
    EVERY_BLOCK,
    MOD,
    RANDOM,
    STRIDED,
    TOKEN_CHOICE,
    routed,
    routed_name,
    shallower,
    single,
)
from sparsemix.reproduce.mod_tables import by_seed, loss_table, percent_above
from sparsemix.reproduce.trends import Claim, judge, ordering, orderings, ranking

CAPACITIES = (0.5, 0.25, 0.125, 0.0625)
SKETCH = (
    "All arms have the same width, not each its best one: the paper compares optima of isoFLOP curves (mod-fig3). "
    "Arms of fewer FLOPs per token train on more tokens for the same budget. All have the rule's learning rate."
)


def routing_design(scale: Scale) -> Design:
    """Learned routing beside every control: same width and depth, but for the shallower dense model."""
    return single(scale, DENSE, MOD, TOKEN_CHOICE, RANDOM, STRIDED, EVERY_BLOCK, shallower(scale))


def routing_outcome(lab: Lab) -> Outcome:
    at, paper = lab.runs, entry("mod-routing").numbers["says"]
    learned = at[MOD.name]
    trends = orderings(
        [
            Claim("learned routing is better than the dense model", learned, at[DENSE.name]),
            Claim("learned routing is better than random routing", learned, at[RANDOM.name]),
            Claim("random routing is worse than the dense model", at[DENSE.name], at[RANDOM.name]),
            Claim("every other block routed is better than every block", learned, at[EVERY_BLOCK.name]),
            Claim("not in the paper: learned routing is better than token choice", learned, at[TOKEN_CHOICE.name]),
            Claim("not in the paper: learned routing is better than every 8th token", learned, at[STRIDED.name]),
            Claim(
                "not in the paper: learned routing is better than a shallower dense model of its FLOPs",
                learned,
                at["shallower dense"],
            ),
        ]
    )
    table = loss_table("Loss by who chooses the tokens", at, paper, "the paper")
    return Outcome([table, _above(at, MOD.name)], trends, notes=[SKETCH], numbers=_numbers(at, MOD.name))


def capacity_design(scale: Scale) -> Design:
    """A dense model and MoD around every other block at each capacity, at one budget: fewer tokens, more steps."""
    return single(scale, DENSE, *map(routed, CAPACITIES))


def capacity_outcome(lab: Lab) -> Outcome:
    paper = entry("mod-capacity").numbers["loss"]
    at = lab.runs
    best = at[routed_name(0.125)]
    claims = [
        Claim("12.5 % is better than dense", best, at[DENSE.name]),
        Claim("12.5 % is better than 50 %", best, at[routed_name(0.5)]),
        Claim("below 12.5 % it gets worse: 12.5 % is better than 6.25 %", best, at[routed_name(0.0625)]),
    ]
    falling = [at[routed_name(capacity)] for capacity in CAPACITIES[:3]]
    trends = judge([ranking("loss falls from 50 over 25 to 12.5 %", falling), *map(ordering, claims)])
    table = loss_table("Loss by capacity, every other block routed", at, paper, "paper: least loss at 6e18")
    return Outcome([table, _above(at, DENSE.name)], trends, [_capacity_chart(at)], [SKETCH], _numbers(at, DENSE.name))


def _capacity_chart(at: dict[str, list[Record]]) -> Chart:
    points, singles = [], []
    for capacity in sorted(CAPACITIES):
        losses = [r.nats for r in at[routed_name(capacity)]]
        points.append((100 * capacity, sum(losses) / len(losses)))
        singles.append([(100 * capacity, nats) for nats in losses])
    seeds = [list(run) for run in zip(*singles, strict=False)]
    dense = [r.nats for r in at[DENSE.name]]
    return Chart(
        "loss-by-capacity", "Loss against capacity", "tokens that a routed block takes (%)",
        "test loss (nats per token)", [Line("MoD", 1, points, seeds)], [("dense", sum(dense) / len(dense))],
        log_x=True, x_ticks=[100 * c for c in sorted(CAPACITIES)], x_text=lambda x: f"{x:g}",
    )  # fmt: skip


def _above(at: dict[str, list[Record]], base: str) -> TextTable:
    """Loss of every arm over the base's in per cent, and its FLOPs per token, seed by seed."""
    rows = []
    for arm, runs in at.items():
        if arm != base:
            values = by_seed(runs, at[base], percent_above(lambda r: r.nats))
            mean = fixed(sum(values) / len(values), 2, signed=True) if values else "–"
            cost = runs[0].forward_flops / at[base][0].forward_flops
            rows.append([arm, mean, " ".join(fixed(v, 2, signed=True) for v in values), percent(cost, 0)])
    columns = ("arm", "loss above (%)", "by seed (%)", "FLOPs per token")
    return TextTable(f"Causal loss above that of {base}", columns, rows)


def _numbers(at: dict[str, list[Record]], base: str) -> dict[str, object]:
    return {
        "base": base,
        "percent_above": {arm: by_seed(runs, at[base], percent_above(lambda r: r.nats)) for arm, runs in at.items()},
    }


REPRODUCTIONS = {
    "mod-routing": Reproduction(routing_design, routing_outcome),
    "mod-capacity": Reproduction(capacity_design, capacity_outcome),
}
