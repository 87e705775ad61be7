"""PEER's granularity, the experts of a token, over sizes and budgets, and the law of fine-grained experts."""

from collections.abc import Mapping, Sequence
from math import log2
from typing import Any

from sparsemix.report.figures import Chart, Line
from sparsemix.report.numbers import DASH, fixed, si
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.report.stats import RESAMPLES
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.peer import RECIPE, sizes
from sparsemix.reproduce.peer_heads import arm, coefficient, grid
from sparsemix.reproduce.trends import Test, bounded, judge
from sparsemix.sweep.arms import Arm

LAW = "L = c + (g / G^gamma + a) / N^alpha + b / D^beta"
WIDTHS: Mapping[str, tuple[int | str, ...]] = {
    "demo": (24, 32, 40, 48),
    "laptop": (32, 40, 48, 64),
    "gpu": (256, 384, 512, 640),
    "paper": ("L6", "L8", "L10"),
}
NO_LAW = (
    "No law is fitted: it takes ten different runs, three sizes and three granularities, and losses on which all of "
    "its terms are positive."
)

# (width, budget) -> experts of a token -> its run.
Cells = Mapping[tuple[int, float], Mapping[int, Record]]


def arms(scale: Scale) -> dict[int, Arm]:
    """Experts of a token -> PEER with so many heads of the scale's top_k: arms of Figure 3b."""
    top_k = sizes(scale).top_k
    return {picks: arm(scale, picks, picks // top_k) for picks, of in grid(scale).items() if picks // top_k in of}


def design(scale: Scale) -> Design:
    """Every granularity at a few sizes and two budgets, one seed each: the law has seven parameters, and sizes and
    tokens must both vary to tell them. The runs of Figure 3b at the larger budget are among them."""
    return Design(
        RECIPE,
        list(arms(scale).values()),
        grid=True,
        size="L8" if scale.name == "paper" else None,
        budgets=(scale.budget / 4, scale.budget),
        sizes=WIDTHS[scale.name],
        seeds=1,
        extend=False,
    )


def outcome(lab: Lab) -> Outcome:
    from sparsemix.report.fits.granularity import granularity_laws

    cells = by_size(lab)
    laws = granularity_laws([r for r in lab.all() if r.role in ("grid", "seed")], RESAMPLES)
    tables = [_losses(cells), _law(laws)]
    notes = [f"{LAW}, nats per token; G experts of a token, N parameters without embeddings, D training tokens."]
    notes += [] if laws else [NO_LAW]
    return Outcome(tables, judge(claims(cells)), [_chart(cells)], notes, {"laws": laws})


def by_size(lab: Lab) -> Cells:
    """The first seed of every size, budget and granularity."""
    found: dict[tuple[int, float], dict[int, Record]] = {}
    for picks, of in arms(lab.scale).items():
        for run in sorted(lab.runs[of.name], key=lambda r: r.seed):
            if run.role in ("grid", "seed"):
                at = run.settings["model"]["d_model"], run.budget
                found.setdefault(at, {}).setdefault(picks, run)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0])))


def claims(cells: Cells) -> list[Test]:
    """Over the sizes and budgets that have three granularities or more, each a sample."""
    slopes, bends = [], []
    for of in cells.values():
        if len(of) >= 3:
            x, y = [log2(picks) for picks in of], [run.nats for run in of.values()]
            slopes.append(_dot(coefficient(x, 1), y))
            bends.append(_dot(coefficient(x, 2), y))
    per = "sizes and budgets, one seed each"
    return [
        bounded("loss falls with granularity", slopes, high=0.0, unit=" nats per doubling", per=per),
        bounded(
            "each doubling gains less than the one before", bends, low=0.0, unit=" nats per doubling squared", per=per
        ),
    ]


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True))


def _losses(cells: Cells) -> TextTable:
    picks = sorted({p for of in cells.values() for p in of})
    rows = [
        [f"{budget:.3g}", str(width), *(fixed(of[p].nats if p in of else None, 4) for p in picks)]
        for (width, budget), of in cells.items()
    ]
    columns = ("FLOPs", "width", *(f"{p} experts" for p in picks))
    return TextTable("Nats per token by experts of a token", columns, rows)


def _law(laws: Sequence[Mapping[str, Any]]) -> TextTable:
    published = entry("peer-granularity").numbers["moe"]
    ours = next((law for law in laws if law["arm"] == "peer"), None)
    rows = []
    for name, theirs in published.items():
        value, bounds = (f"{ours[name]:.3g}", ours["ci"][name]) if ours else (DASH, None)
        # Intervals of factors span many powers of ten where the runs do not tell them.
        rows.append([name, value, f"[{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds else DASH, f"{theirs:g}"])
    return TextTable(f"The law {LAW}", ("parameter", "here, PEER", "95 %", "arXiv:2402.07871, mixtures"), rows)


def _chart(cells: Cells) -> Chart:
    budget = max(b for _, b in cells)
    lines = [
        Line(f"width {width}", style, [(float(p), of[p].nats) for p in sorted(of)])
        for style, (width, of) in enumerate((w, of) for (w, b), of in cells.items() if b == budget)
    ]
    ticks = sorted({x for line in lines for x, _ in line.points})
    title = f"Loss by granularity at {budget:.3g} training FLOPs"
    return Chart(
        "granularity", title, "experts of a token", "nats per token", lines, log_x=True, x_ticks=ticks, x_text=si
    )


REPRODUCTIONS = {"peer-granularity": Reproduction(design, outcome)}
