"""Figure 4 of PEER: isoFLOP curves with and without batch norm on the queries."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsemix.report.fits.curves import standing_runs
from sparsemix.report.numbers import DASH, fixed, si
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.peer import RECIPE, peer, sizes
from sparsemix.reproduce.peer_isoflop import PAPER_SIZES, TOKENIZER, by_arm, chart, fitted, perplexity
from sparsemix.reproduce.tables import spread
from sparsemix.reproduce.trends import Claim, bounded, judge, ordering

# The first is an arm of Figure 1: both have these runs.
WITH, WITHOUT = "PEER", "PEER, no batch norm"


def design(scale: Scale) -> Design:
    """PEER's curve of Figure 1 at the smaller budget, and the same without the norm."""
    own = sizes(scale)
    arms = [peer(WITH, own), peer(WITHOUT, own, "model.blocks.ffn.query_norm=none")]
    budgets = scale.budgets[:1]
    if scale.name == "paper":
        return Design(RECIPE, arms, grid=True, size="L8", budgets=budgets, sizes_by_budget=PAPER_SIZES[:1])
    return Design(RECIPE, arms, grid=True, budgets=budgets)


def outcome(lab: Lab) -> Outcome:
    said, analysis, best = entry("peer-fig4").numbers, fitted(lab, WITHOUT), standing_runs(lab.all())
    budget = analysis["budgets"][0]
    ours, theirs = best[WITH, budget], best[WITHOUT, budget]
    sized = {arm: by_width(runs) for arm, runs in lab.runs.items()}
    both = sorted(sized[WITH].keys() & sized[WITHOUT].keys())
    first = [sized[WITH][w][0].nats - sized[WITHOUT][w][0].nats for w in both]
    trends = judge(
        [
            ordering(Claim("batch norm lowers the loss, each at its optimum", ours, theirs)),
            bounded(
                "batch norm lowers the loss over the curve",
                first,
                high=0.0,
                unit=" nats per token",
                per="sizes, one seed each",
            ),
        ]
    )
    tables = [_curve(sized, {arm: best[arm, budget] for arm in sized}), _published(said)]
    notes = [TOKENIZER, *analysis["warnings"]]
    return Outcome(
        tables, trends, [chart("norm", budget, lab, best, by_arm(analysis))], notes, {"curves": analysis["curves"]}
    )


Sized = Mapping[str, Mapping[int, Sequence[Record]]]


def by_width(runs: Sequence[Record]) -> dict[int, list[Record]]:
    """Width -> its runs, seed 0 first; learning rates that were tried are left out."""
    found: dict[int, list[Record]] = {}
    for run in sorted(runs, key=lambda r: (r.params, r.seed)):
        if run.role in ("grid", "seed"):
            found.setdefault(run.settings["model"]["d_model"], []).append(run)
    return found


def _curve(sized: Sized, best: Mapping[str, Sequence[Record]]) -> TextTable:
    rows = []
    optimal = {arm: runs[0].params for arm, runs in best.items()}
    for width in sorted(set().union(*sized.values())):
        found = {arm: sized[arm].get(width, []) for arm in (WITHOUT, WITH)}
        params = max(runs[0].params for runs in found.values() if runs)
        at = [arm for arm, runs in found.items() if runs and runs[0].params == optimal[arm]]
        difference = DASH
        if all(found.values()):
            difference = fixed(perplexity(found[WITH][:1]) - perplexity(found[WITHOUT][:1]), 3, signed=True)
        values = [spread([perplexity([run]) for run in runs], 2) for runs in found.values()]
        marks = {(WITHOUT,): "without", (WITH,): "with", (WITHOUT, WITH): "both"}
        rows.append([str(width), si(params), *values, difference, marks.get(tuple(at), "")])
    columns = ("width", "parameters", "without", "with batch norm", "difference, seed 0", "seeds at the optimum of")
    return TextTable("Perplexity by size", columns, rows)


def _published(said: Mapping[str, Any]) -> TextTable:
    triples = zip(said["params"], said["without"], said["with"], strict=True)
    rows = [[si(n), fixed(no, 2), fixed(yes, 2), fixed(yes - no, 2, signed=True)] for n, no, yes in triples]
    columns = ("parameters", "without", "with batch norm", "difference")
    return TextTable(f"The paper's curves (digitised): perplexity on C4 at {said['budget']:.3g} FLOPs", columns, rows)


REPRODUCTIONS = {"peer-fig4": Reproduction(design, outcome)}
