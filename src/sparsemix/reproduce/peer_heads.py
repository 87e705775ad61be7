"""Figure 3b of PEER: heads and experts of a token, at a fixed pool."""

from collections.abc import Mapping, Sequence
from math import log2
from statistics import fmean

from sparsemix.report.figures import Chart, Line
from sparsemix.report.numbers import DASH, fixed, si
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.peer import RECIPE, one_size, peer, sizes
from sparsemix.reproduce.peer_isoflop import TOKENIZER, perplexity
from sparsemix.reproduce.tables import spread
from sparsemix.reproduce.trends import Test, contrast, judge, slope
from sparsemix.sweep.arms import Arm

# Experts of a token -> numbers of heads, as in the paper; at the small scales half the heads of half as many experts.
PAPER = {32: (2, 4, 8), 64: (2, 4, 8), 128: (4, 8, 16), 256: (4, 8, 16), 512: (8, 16, 32)}
HALVED = {picks // 4: tuple(heads // 2 for heads in of) for picks, of in PAPER.items()}
# At the demo's width the last row would cost a third of the model; in the paper the dearest layer costs an eighth.
SHORT = {picks: of for picks, of in HALVED.items() if picks <= 64}
GRIDS = {"demo": SHORT, "laptop": HALVED, "gpu": PAPER, "paper": PAPER}
# So many arms that more seeds would cost more than the rest of the paper.
MOST_SEEDS = 3
PER = "bits per byte per doubling"

Runs = Mapping[tuple[int, int], Sequence[Record]]


def grid(scale: Scale) -> dict[int, tuple[int, ...]]:
    return GRIDS[scale.name]


def arm(scale: Scale, picks: int, heads: int) -> Arm:
    """PEER with `picks` experts a token, found by so many heads."""
    own = sizes(scale)._replace(num_heads=heads, top_k=picks // heads)
    return peer(f"{picks} experts by {_heads(heads)}", own)


def design(scale: Scale) -> Design:
    """Every pair of the paper's figure."""
    size, overrides = one_size(scale)
    arms = [arm(scale, picks, heads) for picks, of in grid(scale).items() for heads in of]
    return Design(RECIPE, arms, size=size, overrides=overrides, seeds=min(scale.seeds, MOST_SEEDS))


def outcome(lab: Lab) -> Outcome:
    at = grid(lab.scale)
    runs = {(picks, h): lab.runs[arm(lab.scale, picks, h).name] for picks, of in at.items() for h in of}
    ours = {key: perplexity(found) for key, found in runs.items()}
    cells = {key: spread([perplexity([run]) for run in found], 2) for key, found in runs.items()}
    paper = {(p, h): loss for p, of in entry("peer-fig3b").numbers["perplexity"].items() for h, loss in of.items()}
    tables = [
        _table("Perplexity by experts of a token and heads", cells, ours),
        _table("The paper's (digitised)", {key: fixed(loss, 2) for key, loss in paper.items()}, paper),
    ]
    side = sizes(lab.scale).side
    notes = [TOKENIZER, f"Of {side}² experts; picks split evenly over the heads. The best of each row is marked *."]
    numbers = {"perplexity": [{"picks": p, "heads": h, "perplexity": loss} for (p, h), loss in ours.items()]}
    return Outcome(tables, judge(claims(runs)), [_chart(ours)], notes, numbers)


def claims(runs: Runs) -> list[Test]:
    """More experts of a token are better, ever less so, and want more heads. Rows count alike, whatever their heads."""
    rows: dict[int, list[int]] = {}
    for picks, heads in runs:
        rows.setdefault(picks, []).append(heads)
    x = [log2(picks) for picks in rows]
    middle = fmean(x)
    spread_x = sum((v - middle) ** 2 for v in x)
    bend, turn = [], []
    # Of the parabola through the rows' means, orthogonal to its line; its coefficient is positive where gains shrink.
    curve = coefficient(x, 2)
    for v, w, (picks, of) in zip(x, curve, rows.items(), strict=True):
        logs = [log2(heads) for heads in of]
        away = [one - fmean(logs) for one in logs]
        norm = sum(a * a for a in away)
        for heads, a in zip(of, away, strict=True):
            bend.append((-w / len(of), runs[picks, heads]))
            turn.append(((v - middle) / spread_x * a / norm, runs[picks, heads]))
    return [
        slope("loss falls with the experts of a token", [(log2(p), found) for (p, _), found in runs.items()], PER),
        contrast("each doubling gains less than the one before", bend, "bits per byte per doubling squared, negated"),
        contrast("more experts of a token want more heads", turn, "bits per byte per doubling of both"),
    ]


def coefficient(x: Sequence[float], power: int) -> list[float]:
    """Weights whose sum with y is the coefficient of x^power in the least-squares polynomial of that degree."""
    import numpy as np

    return np.linalg.pinv(np.vander(np.array(x), power + 1, increasing=True))[power].tolist()


def _heads(number: int) -> str:
    return f"{number} head{'s' if number > 1 else ''}"


def _table(caption: str, cells: Mapping[tuple[int, int], str], losses: Mapping[tuple[int, int], float]) -> TextTable:
    """A row a number of experts of a token, a column a number of heads."""
    columns = sorted({heads for _, heads in cells})
    rows = []
    for picks in sorted({picks for picks, _ in cells}):
        best = min((loss, heads) for (p, heads), loss in losses.items() if p == picks)[1]
        marked = [f"{cells.get((picks, h), DASH)}{' *' if h == best else ''}" for h in columns]
        rows.append([str(picks), *marked])
    return TextTable(caption, ("experts of a token", *map(_heads, columns)), rows)


def _chart(losses: Mapping[tuple[int, int], float]) -> Chart:
    heads = sorted({h for _, h in losses})
    lines = [
        Line(_heads(h), style, [(float(p), loss) for (p, own), loss in losses.items() if own == h])
        for style, h in enumerate(heads)
    ]
    ticks = sorted({float(p) for p, _ in losses})
    title = "Perplexity by experts of a token"
    return Chart("heads", title, "experts of a token", "perplexity", lines, log_x=True, x_ticks=ticks, x_text=si)


REPRODUCTIONS = {"peer-fig3b": Reproduction(design, outcome)}
