"""The ways to skip in Mixture-of-Depths-and-Experts: whole blocks, no-op experts, and seats that run out."""

from statistics import fmean

from sparsemix.report.numbers import DASH, fixed, percent, si
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mod_arms import DENSE, INTEGRATED, MOD, MOE, STAGED, dropping, single
from sparsemix.reproduce.mod_tables import by_seed, loss_table, percent_above
from sparsemix.reproduce.tables import spread
from sparsemix.reproduce.trends import Claim, orderings
from sparsemix.run import Run

DROPS = "MoE, reduced capacity"


def design(scale: Scale) -> Design:
    """Dense, MoD and MoE, and the three ways to have both; experts stand in every other block, those MoD routes."""
    return single(scale, DENSE, MOD, MOE, STAGED, INTEGRATED, dropping(scale))


def outcome(lab: Lab) -> Outcome:
    at, paper = lab.runs, entry("mode-variants").numbers["percent_below_moe"]
    staged, integrated = at[STAGED.name], at[INTEGRATED.name]
    trends = orderings(
        [
            Claim("staged MoDE is better than MoE: the gains compound", staged, at[MOE.name]),
            Claim("staged MoDE is better than MoD", staged, at[MOD.name]),
            Claim("integrated MoDE is better than dropping by reduced capacity", integrated, at[DROPS]),
            Claim("not in the paper: integrated MoDE is better than MoE", integrated, at[MOE.name]),
        ]
    )
    words = {arm: f"% below MoE: {text}" for arm, text in paper.items()}
    below = {arm: by_seed(runs, at[MOE.name], percent_above(lambda r: r.nats)) for arm, runs in at.items()}
    tables = [loss_table("Loss by the way to skip", at, words, "the paper"), _skipped(at, below)]
    return Outcome(tables, trends, notes=NOTES, numbers={"percent_above_moe": below})


NOTES = [
    "Reduced capacity has the experts of the integrated variant and four fifths of their seats, so that both cost the "
    "same. Seats run out in training alone: the causal rule drops nobody, and so costs more than training did.",
    "The paper gives no number of experts, no top-k and no capacity of its MoDE; here 8 experts, 2 a token, and 2 "
    "no-ops in the integrated variant. Staged and MoD train on more tokens, as a token costs them less.",
]


def _skipped(at: dict[str, list[Record]], below: dict[str, list[float]]) -> TextTable:
    """Loss against MoE, and what was skipped."""
    rows = []
    for arm, runs in at.items():
        cost = [si(fmean(r.result[name] for r in runs if name in r.result)) for name in ("eval_flops_per_token",)]
        parts = [
            spread([100 * share for run in runs if (share := _share(run, name)) is not None], 1) for name in SHARES
        ]
        percent_of = percent(runs[0].forward_flops / at[DENSE.name][0].forward_flops, 0)
        rows.append([arm, fixed(fmean(below[arm]), 2, signed=True) if below[arm] else DASH, percent_of, *cost, *parts])
    columns = ("arm", "loss above MoE (%)", "FLOPs of dense's", "FLOPs per token, causal", *SHARES.values())
    return TextTable("What is skipped, as training ended", columns, rows)


SHARES = {"noop_share": "picks of no-ops (%)", "dropped": "picks dropped (%)"}


def _share(run: Record, name: str) -> float | None:
    """A share that layers log, mean over layers and the last tenth of the training steps."""
    lines = [list(line.items()) for line in Run(run.folder).metrics()]
    last = lines[-max(1, len(lines) // 10) :]
    values = [value for line in last for key, value in line if key.rpartition(".")[2] == name]
    return fmean(values) if values else None


REPRODUCTIONS = {"mode-variants": Reproduction(design, outcome)}
