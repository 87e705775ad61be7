"""isoFLOP curves of dense models and Mixture-of-Depths: Figures 3 and 4 of the paper."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsemix.report.numbers import DASH, exponent, fixed, interval, percent, si
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mod_arms import DENSE, FAMILY, MOD, PUBLISHED, RANDOM_HALF, routed, size_of
from sparsemix.reproduce.mod_callouts import callouts
from sparsemix.reproduce.mod_curves import (
    Analysis,
    analysis_of,
    best_ordering,
    bracketed,
    curve_of,
    curves_chart,
    missing_optimum,
    nats_text,
    quantity,
    ratio,
    relative,
    relative_chart,
    within,
)
from sparsemix.reproduce.trends import Test, estimated, judge
from sparsemix.sweep.arms import Arm

HALF = routed(0.5)
# "About the same" FLOPs per forward pass: the figure's minima lie at 1.0 to 1.4 of the dense optimum's.
SAME = (0.8, 1.4)
FASTER = 1.6


def one_budget(scale: Scale) -> float:
    """The budget of the figures that have one: the paper's smallest, elsewhere the scale's largest, as the effects are
    small."""
    return 6e18 if scale.name == "paper" else scale.budgets[-1]


def grid(scale: Scale, arms: Sequence[Arm], budgets: tuple[float, ...]) -> Design:
    """Every arm on a ladder of sizes; the paper's own at its scale."""
    sizes = PUBLISHED if scale.name == "paper" else None
    return Design(FAMILY, arms, grid=True, size=size_of(scale), budgets=budgets, sizes=sizes)


def fig3_design(scale: Scale) -> Design:
    """Dense, MoD at 12.5 % and 50 %, and random routing at one budget."""
    return grid(scale, (DENSE, MOD, HALF, RANDOM_HALF), (one_budget(scale),))


def fig3_outcome(lab: Lab) -> Outcome:
    analysis, budget = analysis_of(lab), one_budget(lab.scale)
    pairs = [
        ("MoD at 12.5 % is better than dense", MOD, DENSE),
        ("MoD at 12.5 % is better than MoD at 50 %", MOD, HALF),
        ("random routing is worse than the dense model", DENSE, RANDOM_HALF),
        ("random routing is worse than learned routing of as many tokens", HALF, RANDOM_HALF),
    ]
    found = callouts(lab, analysis, budget)
    tests = [best_ordering(analysis, lab.runs, budget, words, a.name, b.name) for words, a, b in pairs]
    tests.append(_more_params(analysis, budget))
    words = f"MoD of the dense optimum's loss makes steps over {percent(FASTER - 1, 0)} faster"
    tests.append(estimated(words, *found.faster, low=FASTER, unit=" times", missing=found.missing))
    paper = entry("mod-fig3").numbers
    said = {(arm, budget): (paper["loss"].get(arm), paper["params"].get(arm)) for arm in lab.runs}
    tables = [_optima_table(analysis, list(lab.runs), (budget,), said), found.table]
    chart = curves_chart(
        analysis, list(lab.runs), (budget,), "isoflop", f"Loss against size at {exponent(budget)} FLOPs"
    )
    numbers = {"quantities": analysis["quantities"], "callouts": found.numbers}
    return Outcome(tables, judge(tests), [chart, *found.figures], [*_notes(analysis), *found.notes], numbers)


def fig4_design(scale: Scale) -> Design:
    """Dense and MoD at several budgets."""
    return grid(scale, (DENSE, MOD), (6e18, 2e19, 1e20) if scale.name == "paper" else scale.budgets)


def fig4_outcome(lab: Lab) -> Outcome:
    analysis, arms = analysis_of(lab), (DENSE.name, MOD.name)
    budgets: list[float] = analysis["budgets"]
    tests: list[Test] = []
    for budget in budgets:
        words = f"{exponent(budget)} FLOPs: the best MoD is better than the best dense"
        tests.append(best_ordering(analysis, lab.runs, budget, words, MOD.name, DENSE.name))
        tests.append(_more_params(analysis, budget))
        tests.append(_same_flops(analysis, budget))
        tests.append(fewer_flops(analysis, budget, 1.0))
    paper = entry("mod-fig4").numbers
    lines = {
        f"{arm}, {exponent(budget)}": relative(analysis, lab.runs[arm], budget, lambda r: r.nats)
        for arm in arms
        for budget in budgets
    }
    styles = [(a * len(budgets) + b, a) for a in range(len(arms)) for b in range(len(budgets))]
    charts = [
        curves_chart(analysis, arms, budgets, "isoflop", "Loss against size"),
        relative_chart(lines, "normalised", "Loss against FLOPs per forward pass", styles),
    ]
    tables = [_optima_table(analysis, arms, budgets, _paper_optima(paper["optima"], budgets)), _ratios(analysis, paper)]
    return Outcome(tables, judge(tests), charts, _notes(analysis), {"quantities": analysis["quantities"]})


def _more_params(analysis: Analysis, budget: float) -> Test:
    said = missing_optimum(analysis, (DENSE.name, MOD.name), budget)
    words = f"{exponent(budget)} FLOPs: the optimal MoD has more parameters than the optimal dense model"
    return estimated(words, *_ratio(analysis, budget, "params"), low=1.0, unit=" times", missing=said)


def _same_flops(analysis: Analysis, budget: float) -> Test:
    said = missing_optimum(analysis, (DENSE.name, MOD.name), budget)
    about = f"({SAME[0]:g} to {SAME[1]:g} times)"
    words = f"{exponent(budget)} FLOPs: the optimal MoD costs about as much per forward pass {about}"
    return estimated(words, *_ratio(analysis, budget, "forward_flops"), *SAME, unit=" times", missing=said)


def fewer_flops(analysis: Analysis, budget: float, at_most: float) -> Test:
    """That MoD reaches the dense optimum's loss at this share of its FLOPs per forward pass, or less."""
    found = quantity(analysis, MOD.name, budget)
    fewer = "fewer FLOPs" if at_most == 1 else f"{percent(at_most, 0)} of the FLOPs or less"
    words = f"{exponent(budget)} FLOPs: MoD reaches the dense optimum's loss with {fewer} per forward pass"
    missing = missing_optimum(analysis, (DENSE.name, MOD.name), budget)
    values = found.get("forward_ratio"), found.get("forward_ratio_ci")
    if bracketed(analysis, DENSE.name, budget) is None:
        values = None, None
    elif values[0] is None and found.get("optimal_params"):
        missing = "no MoD on the curve reaches that loss"
    return estimated(words, *values, high=at_most, unit=" times", missing=missing)


def _ratio(analysis: Analysis, budget: float, key: str) -> tuple[float | None, list[float] | None]:
    mod, dense = (bracketed(analysis, arm, budget) for arm in (MOD.name, DENSE.name))
    return ratio(mod, dense, key)


def _optima_table(
    analysis: Analysis, arms: Sequence[str], budgets: Sequence[float], paper: Mapping[tuple[str, float], Sequence[Any]]
) -> TextTable:
    """Size, loss and gap at each optimum with 95 % intervals, and the paper's loss and size."""
    rows = []
    for budget in budgets:
        for arm in arms:
            curve, q = curve_of(analysis, arm, budget), quantity(analysis, arm, budget)
            best = curve["optimum"] or {}
            gap = fixed(q.get("gap_percent"), 2, signed=True)
            loss, size = paper.get((arm, budget), (None, None))
            rows.append(
                [
                    arm,
                    exponent(budget),
                    within(best.get("params"), best.get("params_ci"), si),
                    within(best.get("nats"), best.get("nats_ci"), nats_text),
                    f"{gap} {interval(q.get('gap_percent_ci'), 2, signed=True)}" if q.get("gap_percent_ci") else gap,
                    within(best.get("forward_flops"), None, si),
                    curve["said"] or ("bracketed" if curve.get("bracketed") else "not bracketed"),
                    fixed(loss, 2) if isinstance(loss, float) else loss or DASH,
                    size or DASH,
                ]
            )
    columns = (
        "arm", "budget", "parameters at the optimum", "nats there", "below dense (%)", "FLOPs per token", "optimum",
        "paper: loss", "paper: parameters",
    )  # fmt: skip
    return TextTable("Optima of the isoFLOP curves, with 95 % intervals; losses are causal", columns, rows)


def _paper_optima(optima: dict[Any, Any], budgets: Sequence[float]) -> dict[tuple[str, float], Sequence[Any]]:
    """The paper's (loss, size) at its budgets, laid beside ours by rank: smallest beside smallest."""
    theirs = sorted((float(budget), found) for budget, found in optima.items())
    return {(arm, ours): said for ours, (_, found) in zip(budgets, theirs, strict=False) for arm, said in found.items()}


def _ratios(analysis: Analysis, paper: dict[str, Any]) -> TextTable:
    rows = []

    def text(value: float) -> str:
        return fixed(value, 2)

    for budget in analysis["budgets"]:
        q = quantity(analysis, MOD.name, budget)
        rows.append(
            [
                exponent(budget),
                within(*_ratio(analysis, budget, "params"), text),
                within(*_ratio(analysis, budget, "forward_flops"), text),
                within(q.get("forward_ratio"), q.get("forward_ratio_ci"), text),
                within(q.get("flop_multiplier"), q.get("flop_multiplier_ci"), lambda value: f"{value:.3g}"),
            ]
        )
    rows.append(["paper", paper["params"], paper["forward_flops"], paper["parity"], DASH])
    columns = (
        "budget", "parameters over dense's", "FLOPs per forward pass over dense's", "at the dense optimum's loss",
        "budget that dense would need",
    )  # fmt: skip
    return TextTable("The optimal MoD beside the optimal dense model", columns, rows)


def _notes(analysis: Analysis) -> list[str]:
    return [
        "Every size has one seed but the one next to each optimum. All arms have the rule's learning rate of a width. "
        "The paper's numbers are of its own budgets, laid beside ours in their order.",
        *analysis["warnings"],
    ]


REPRODUCTIONS = {
    "mod-fig3": Reproduction(fig3_design, fig3_outcome),
    "mod-fig4": Reproduction(fig4_design, fig4_outcome),
}
