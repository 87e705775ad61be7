"""PEER's isoFLOP curves (Figure 1): dense, expert choice, product-key memory and PEER at two budgets."""

from collections.abc import Mapping, Sequence
from math import exp, log
from statistics import fmean
from typing import Any

from sparsemix.report.figures import Chart, Line, Star
from sparsemix.report.fits.curves import standing_runs
from sparsemix.report.numbers import DASH, fixed, interval, si
from sparsemix.report.optimum import by_size
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import Entry, entry
from sparsemix.reproduce.peer import RECIPE, methods
from sparsemix.reproduce.trends import Claim, orderings

PAPER_SIZES = (tuple(f"L{n}" for n in range(4, 14)), tuple(f"L{n}" for n in (*range(7, 15), 16, 18)))
TOKENIZER = (
    "Perplexity is per token of the tokenizer that was trained on this text; the paper's is another (about 32,000 "
    "tokens), on another text. Absolute values do not compare: compare the order and the ratio to dense."
)
LOOKS_AHEAD = (
    "Expert choice picks tokens over a whole sequence, so its perplexity by the top-k of training sees later tokens "
    "and is no likelihood. All other numbers are causal: each expert takes a token above its running threshold."
)

Optima = Mapping[tuple[str, float], Sequence[Record]]
# (arm, budget) -> its curve of the analysis.
Curves = Mapping[tuple[str, float], Mapping[str, Any]]


def design(scale: Scale) -> Design:
    """The four methods on a ladder of sizes at both budgets; Table 1 takes its optima. In the paper L4 to L13 at
    6e18 FLOPs, L7 to L18 at 2e19."""
    if scale.name == "paper":
        return Design(RECIPE, methods(scale), grid=True, size="L8", sizes_by_budget=PAPER_SIZES)
    return Design(RECIPE, methods(scale), grid=True)


def fitted(lab: Lab, baseline: str) -> dict[str, Any]:
    """The isoFLOP analysis of the study's runs."""
    from sparsemix.report.isoflop import analyse

    return analyse(lab.all(), baseline=baseline)


def by_arm(analysis: Mapping[str, Any]) -> Curves:
    return {(curve["arm"], curve["budget"]): curve for curve in analysis["curves"]}


def perplexity(runs: Sequence[Record]) -> float:
    """exp of the mean over seeds of nats per token."""
    return exp(fmean(r.nats for r in runs))


def lookahead_nats(record: Record) -> float | None:
    """Nats per token by the routing of training; tokens and bytes are those of the causal loss."""
    return None if record.lookahead_bpb is None else record.nats * record.lookahead_bpb / record.bpb


def outcome(lab: Lab) -> Outcome:
    said, analysis = entry("peer-fig1"), fitted(lab, "Dense")
    best, budgets = standing_runs(lab.all()), analysis["budgets"]
    curves = by_arm(analysis)
    figures = [chart(f"isoflop-{i + 1}", budget, lab, best, curves) for i, budget in enumerate(budgets)]
    notes = [TOKENIZER, LOOKS_AHEAD, *analysis["warnings"]]
    numbers = {"quantities": analysis["quantities"], "curves": analysis["curves"]}
    return Outcome(
        [_optima(said, budgets, best, curves), paper_curves(said)], orderings(claims(best)), figures, notes, numbers
    )


def claims(best: Optima) -> list[Claim]:
    """The order of the methods at their optima, budget by budget."""
    pairs = (("PEER", "MoE"), ("PEER", "PKM"), ("PEER", "Dense"), ("PKM", "Dense"), ("MoE", "Dense"))
    return [
        Claim(f"{better} is better than {worse} at {budget:.3g} FLOPs, each at its optimum", best[a], best[b])
        for budget in sorted({budget for _, budget in best})
        for better, worse in pairs
        if (a := (better, budget)) in best and (b := (worse, budget)) in best
    ]


def chart(id: str, budget: float, lab: Lab, best: Optima, curves: Curves) -> Chart:
    """Perplexity against parameters at one budget, a line a method; a star at its fitted optimum, a ring around the
    best size where none is fitted."""
    lines = []
    for style, (arm, runs) in enumerate(lab.runs.items()):
        if sizes := by_size(r for r in runs if r.budget == budget):
            points = sorted((float(size[0].params), perplexity(size)) for size in sizes)
            at = best[arm, budget]
            fit = (curves.get((arm, budget)) or {}).get("optimum")
            ring = None if fit else (float(at[0].params), perplexity(at))
            lines.append(Line(arm, style, points, ring=ring, star=_star(fit) if fit else None))
    title = f"Perplexity by parameters at {budget:.3g} training FLOPs"
    return Chart(id, title, "parameters", "perplexity", lines, log_x=True, x_text=si)


def _star(fit: Mapping[str, Any]) -> Star:
    low, high = fit["nats_ci"] or (fit["nats"], fit["nats"])
    return Star(fit["params"], exp(fit["nats"]), fit["params_ci"], (exp(low), exp(high)))


def _optima(said: Entry, budgets: Sequence[float], best: Optima, curves: Curves) -> TextTable:
    """Each method at its optimum beside the paper's best of its figure; the paper's budgets in their order."""
    columns = (
        *("FLOPs", "method", "parameters", "95 %", "perplexity", "95 %", "of dense", "top-k perplexity", "seeds"),
        *("paper: FLOPs", "paper: best depth", "paper: perplexity", "paper: of dense"),
    )
    rows, published = [], said.numbers
    for i, budget in enumerate(budgets):
        for arm in published["perplexity"]:
            if (arm, budget) not in best:
                continue
            runs, fit = best[arm, budget], (curves.get((arm, budget)) or {}).get("optimum")
            theirs = _published(published, arm, i)
            dense = _published(published, "Dense", i)
            value = _fitted_or_run(fit, runs)
            base = _fitted_or_run((curves.get(("Dense", budget)) or {}).get("optimum"), best["Dense", budget])
            rows.append(
                [
                    f"{budget:.3g}",
                    arm,
                    si(fit["params"] if fit else runs[0].params),
                    f"[{', '.join(si(x) for x in fit['params_ci'])}]" if fit and fit["params_ci"] else DASH,
                    fixed(exp(value), 2),
                    interval([exp(x) for x in fit["nats_ci"]], 2) if fit and fit["nats_ci"] else DASH,
                    fixed(exp(value - base), 3),
                    _top_k(arm, runs),
                    str(len(runs)),
                    *theirs_cells(published, i, theirs, dense),
                ]
            )
    return TextTable(
        "Each method at its optimum (of the fitted curve; where none can be fitted, the best size)", columns, rows
    )


def _fitted_or_run(fit: dict[str, Any] | None, runs: Sequence[Record]) -> float:
    return fit["nats"] if fit else log(perplexity(runs))


def _top_k(arm: str, runs: Sequence[Record]) -> str:
    ahead = [x for r in runs if (x := lookahead_nats(r)) is not None]
    return fixed(exp(fmean(ahead)), 2) if arm == "MoE" and ahead else DASH


def _published(numbers: Mapping[str, Any], arm: str, i: int) -> tuple[int, float] | None:
    """(depth, perplexity) of the paper's best at its budget number `i`."""
    if i >= len(numbers["budgets"]):
        return None
    losses = numbers["perplexity"][arm][i]
    at = min(range(len(losses)), key=losses.__getitem__)
    return numbers["depths"][i][at], losses[at]


def theirs_cells(
    numbers: Mapping[str, Any], i: int, theirs: tuple[int, float] | None, dense: tuple[int, float] | None
) -> tuple[str, ...]:
    if theirs is None or dense is None:
        return (DASH,) * 4
    return f"{numbers['budgets'][i]:.3g}", f"L{theirs[0]}", fixed(theirs[1], 2), fixed(theirs[1] / dense[1], 3)


def paper_curves(said: Entry) -> TextTable:
    """The paper's curves."""
    numbers = said.numbers
    depths = sorted({depth for by_budget in numbers["depths"] for depth in by_budget})
    rows = []
    for i, budget in enumerate(numbers["budgets"]):
        for arm, losses in numbers["perplexity"].items():
            by_depth = dict(zip(numbers["depths"][i], losses[i], strict=True))
            rows.append([f"{arm}, {budget:.3g}", *(fixed(by_depth.get(depth), 2) for depth in depths)])
    return TextTable(
        f"The paper's curves ({said.how}): perplexity on C4 by depth",
        ("method, FLOPs", *(f"L{d}" for d in depths)),
        rows,
    )


REPRODUCTIONS = {"peer-fig1": Reproduction(design, outcome)}
