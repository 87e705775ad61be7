"""Figure 3a and Table 2 of PEER: the number of experts, and batch norm on the queries."""

from collections.abc import Mapping, Sequence
from math import log2
from statistics import fmean
from typing import Any

from sparsemix.report.figures import Chart, Line
from sparsemix.report.numbers import DASH, SPACE, fixed, si
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.peer import RECIPE, one_size, peer, sizes
from sparsemix.reproduce.peer_isoflop import TOKENIZER, perplexity
from sparsemix.reproduce.peer_usage import VISITS, Usage, usage
from sparsemix.reproduce.tables import loss_cells, spread
from sparsemix.reproduce.trends import Claim, Test, bounded, contrast, judge, ordering, slope
from sparsemix.sweep.arms import Arm

SIDES = {
    "demo": (16, 32, 64, 128),
    "laptop": (32, 64, 128, 256),
    "gpu": (64, 128, 256, 512),
    "paper": (128, 256, 512, 1024),
}
# Percent of a pool that is nearly all used.
NEARLY_ALL = 99


def _name(side: int, norm: bool = True) -> str:
    return f"{side}² experts" + ("" if norm else ", no batch norm")


def _arm(scale: Scale, side: int, norm: bool = True) -> Arm:
    changes = () if norm else ("model.blocks.ffn.query_norm=none",)
    return peer(_name(side, norm), sizes(scale)._replace(side=side), *changes)


def pools_design(scale: Scale) -> Design:
    """Dense, and PEER with four numbers of experts, each 4 times the one before, at fixed heads and top_k."""
    size, overrides = one_size(scale)
    arms = [Arm("Dense"), *(_arm(scale, side) for side in SIDES[scale.name])]
    return Design(RECIPE, arms, size=size, overrides=overrides)


def norm_design(scale: Scale) -> Design:
    """The pools of Figure 3a, each without and with batch norm on the queries."""
    size, overrides = one_size(scale)
    arms = [_arm(scale, side, norm) for side in SIDES[scale.name] for norm in (False, True)]
    return Design(RECIPE, arms, size=size, overrides=overrides)


def falls(words: str, runs: Mapping[str, Sequence[Record]], sides: Sequence[int]) -> Test:
    """Loss falls along the logarithm of the number of experts."""
    return slope(words, [(log2(side), runs[_name(side)]) for side in sides], "bits per byte per fourfold experts")


def pools_outcome(lab: Lab) -> Outcome:
    said, sides = entry("peer-fig3a").numbers, SIDES[lab.scale.name]
    dense, at = lab.runs["Dense"], {side: lab.runs[_name(side)] for side in sides}
    base = perplexity(dense)
    rows = [["Dense", *_row(dense, base), "Dense", fixed(said["dense"], 2), "1.000"]]
    for side, their_side, theirs in zip(sides, said["sides"], said["perplexity"], strict=True):
        paper = (f"{their_side}² = {si(their_side**2)}", fixed(theirs, 2), fixed(theirs / said["dense"], 3))
        rows.append([f"{side}² = {si(side**2)}", *_row(at[side], base), *paper])
    columns = ("experts", "parameters", "bits per byte", "perplexity", "of dense", "seeds")
    paper_columns = ("paper: experts", "paper: perplexity", "paper: of dense")
    table = TextTable("Loss by the number of experts", (*columns, *paper_columns), rows)
    last, before = sides[-1], sides[-2]
    trends = judge(
        [
            falls("perplexity falls as the pool grows", lab.runs, sides),
            ordering(Claim(f"no saturation: {last}² is better than {before}²", at[last], at[before])),
            ordering(Claim(f"the smallest pool, {sides[0]}², is better than dense", at[sides[0]], dense)),
            ordering(Claim(f"the largest pool, {last}², is better than dense", at[last], dense)),
        ]
    )
    points = [(float(side**2), perplexity(at[side])) for side in sides]
    ticks = [x for x, _ in points]
    title = "Perplexity by the number of experts"
    line = Line("PEER", 0, points)
    chart = Chart(
        "experts", title, "experts", "perplexity", [line], [("dense", base)], log_x=True, x_ticks=ticks, x_text=si
    )
    return Outcome([table], trends, [chart], [TOKENIZER, _sizes(lab)])


def _row(runs: Sequence[Record], base: float) -> list[str]:
    ratio = fixed(perplexity(runs) / base, 3)
    return [si(runs[0].params), loss_cells(runs)[0], _perplexities(runs), ratio, str(len(runs))]


def _perplexities(runs: Sequence[Record]) -> str:
    return spread([perplexity([run]) for run in runs], 2)


def _sizes(lab: Lab) -> str:
    own = sizes(lab.scale)
    return f"PEER replaces the middle feed-forward: {own.num_heads} heads of {own.top_k} experts a token."


def norm_outcome(lab: Lab) -> Outcome:
    said, sides = entry("peer-table2").numbers, SIDES[lab.scale.name]
    runs = {(side, norm): lab.runs[_name(side, norm)] for side in sides for norm in (False, True)}
    used = {at: [usage(run, lab.data, lab.say) for run in found] for at, found in runs.items()}
    table = TextTable("Number of experts and batch norm on the queries", _columns(said, sides), _rows(said, runs, used))
    notes = [TOKENIZER, _sizes(lab), _counted(used)]
    numbers = {
        "usage": [
            {"experts": side**2, "batch_norm": norm, "seed": run.seed, **one._asdict()}
            for (side, norm), found in runs.items()
            for run, one in zip(found, used[side, norm], strict=True)
        ]
    }
    return Outcome([table], judge(_norm_claims(lab, sides, runs, used)), _charts(sides, used), notes, numbers)


At = tuple[int, bool]


def _columns(said: Mapping[str, Any], sides: Sequence[int]) -> tuple[str, ...]:
    heads = []
    for side, theirs in zip(sides, said["sides"], strict=True):
        paper = "" if side == theirs else f" (paper: {theirs}²)"
        heads += [f"{side}²{paper}, {norm}" for norm in ("no", "yes")]
    return ("experts, batch norm", *heads)


def _rows(
    said: Mapping[str, Any], runs: Mapping[At, Sequence[Record]], used: Mapping[At, Sequence[Usage]]
) -> list[list[str]]:
    def paper(name: str, digits: int) -> list[str]:
        pairs = zip(said[name]["without"], said[name]["with"], strict=True)
        return [fixed(value, digits) for pair in pairs for value in pair]

    def percent(found: Sequence[Usage]) -> str:
        least = "" if all(one.enough for one in found) else f"≥{SPACE}"
        return least + spread([100 * one.usage for one in found], 1)

    return [
        ["perplexity", *(_perplexities(found) for found in runs.values())],
        ["perplexity, paper", *paper("perplexity", 2)],
        ["expert usage, %", *(percent(found) for found in used.values())],
        ["expert usage, %, paper", *paper("usage", 1)],
        ["unevenness, KL in nats", *(spread([one.unevenness for one in found], 2) for found in used.values())],
        ["unevenness, KL in nats, paper", *paper("unevenness", 2)],
        ["evaluation tokens", *(_tokens(found) for found in used.values())],
        ["evaluation tokens needed", *(si(max(one.needed for one in found)) for found in used.values())],
        ["parameters", *(si(found[0].params) for found in runs.values())],
        ["seeds", *(str(len(found)) for found in runs.values())],
    ]


def _tokens(found: Sequence[Usage]) -> str:
    return si(min(one.tokens for one in found)) if found else DASH


def _counted(used: Mapping[At, Sequence[Usage]]) -> str:
    few = min((one for found in used.values() for one in found), key=lambda one: one.tokens / one.needed)
    said = (
        f"Usage and unevenness are of gate mass, by the causal rule, over at least {few.tokens} evaluation tokens; "
        f"{VISITS} N / (heads x top_k) are {few.needed} for the largest pool."
    )
    return said if few.enough else f"{said} Where a text holds fewer tokens, usage is a lower bound (≥)."


def _norm_claims(
    lab: Lab, sides: Sequence[int], runs: Mapping[At, Sequence[Record]], used: Mapping[At, Sequence[Usage]]
) -> list[Test]:
    by_seed = {at: {run.seed: one for run, one in zip(runs[at], used[at], strict=True)} for at in runs}
    seeds = sorted(set.intersection(*(set(found) for found in by_seed.values())))
    mean = 1 / len(sides)
    lower = [(weight, runs[side, norm]) for side in sides for norm, weight in ((True, mean), (False, -mean))]
    more_even = [fmean(by_seed[n, True][s].unevenness - by_seed[n, False][s].unevenness for n in sides) for s in seeds]
    away = [log2(side) - fmean(map(log2, sides)) for side in sides]
    scale = sum(x * x for x in away)
    grows = [sum(x * by_seed[n, True][s].unevenness for x, n in zip(away, sides, strict=True)) / scale for s in seeds]
    largest = [100 * by_seed[sides[-1], True][s].usage for s in seeds]
    nearly_all = f"with batch norm at least {NEARLY_ALL} % of {sides[-1]}² experts are used"
    return [
        falls("with batch norm, perplexity falls as the pool grows", lab.runs, sides),
        contrast("batch norm lowers the loss, over the pools", lower),
        bounded("batch norm makes use more even, over the pools", more_even, high=0.0, unit=" nats of KL"),
        bounded("use gets less even as the pool grows", grows, low=0.0, unit=" nats of KL per fourfold experts"),
        bounded(nearly_all, largest, low=NEARLY_ALL, unit=" %"),
    ]


def _charts(sides: Sequence[int], used: Mapping[At, Sequence[Usage]]) -> list[Chart]:
    ticks = [float(side**2) for side in sides]

    def chart(id: str, title: str, y_label: str, value: str, factor: float) -> Chart:
        lines = [
            Line(
                f"{'with' if norm else 'without'} batch norm",
                style,
                [(float(n**2), factor * fmean(getattr(one, value) for one in used[n, norm])) for n in sides],
            )
            for style, norm in enumerate((False, True))
        ]
        return Chart(id, title, "experts", y_label, lines, log_x=True, x_ticks=ticks, x_text=si)

    return [
        chart("usage", "Experts that are used", "experts used (%)", "usage", 100),
        chart("unevenness", "Unevenness of use", "KL to even use (nats)", "unevenness", 1),
    ]


REPRODUCTIONS = {
    "peer-fig3a": Reproduction(pools_design, pools_outcome),
    "peer-table2": Reproduction(norm_design, norm_outcome),
}
