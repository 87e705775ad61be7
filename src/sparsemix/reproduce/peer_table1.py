"""Table 1 of PEER: each method at its optimum on five corpora."""

from collections.abc import Callable, Mapping, Sequence
from math import log
from statistics import fmean
from typing import Any

from sparsemix.report.fits.curves import standing_runs
from sparsemix.report.numbers import fixed, si
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Lab, Outcome, Reproduction, Trend
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.peer_corpora import MAX_TOKENS, Corpora, Measured
from sparsemix.reproduce.peer_isoflop import LOOKS_AHEAD, TOKENIZER, design
from sparsemix.reproduce.tables import spread
from sparsemix.reproduce.trends import bounded, judge

TITLES = {"curation": "Curation", "lambada": "Lambada", "pile": "Pile", "wikitext": "Wikitext", "c4": "C4"}
NO_DATA = "no data here"

# By seed, what a method reads on each corpus.
Seeds = Mapping[int, Mapping[str, Measured]]
Found = Mapping[tuple[str, float], Seeds]


def outcome(lab: Lab) -> Outcome:
    """Raises ConfigError where a corpus' file cannot be read."""
    numbers = entry("peer-table1").numbers
    names = list(numbers["corpora"])
    corpora = Corpora(names, lab.corpora, MAX_TOKENS[lab.scale.name])
    best = standing_runs(lab.all())
    found = measured(best, corpora, lab.say)
    at_hand = [name for name in names if name in corpora.found and name not in corpora.missing]
    budgets = sorted({budget for _, budget in best})
    tables = [
        perplexities(numbers, found, budgets, at_hand),
        ratios(numbers, found, budgets, at_hand),
        bits(found, budgets, at_hand, numbers),
        chosen(best),
    ]
    notes = [TOKENIZER, LOOKS_AHEAD]
    notes += [f"{TITLES[name]}: {why}" for name, why in corpora.missing.items()]
    if (tokens := corpora.options.max_tokens) is not None and at_hand:
        notes.append(f"Of each source of a corpus the first whole documents within {tokens} tokens are read.")
    raw = [
        {"method": arm, "budget": budget, "seed": seed, "corpora": {n: m._asdict() for n, m in values.items()}}
        for (arm, budget), seeds in found.items()
        for seed, values in seeds.items()
    ]
    return Outcome(tables, claims(found, budgets, at_hand), (), notes, {"perplexity": raw})


def measured(best: Mapping[tuple[str, float], Sequence[Record]], corpora: Corpora, say: Callable[[str], None]) -> Found:
    """Every method at its optimum at every budget, by seed."""
    found: dict[tuple[str, float], dict[int, dict[str, Measured]]] = {}
    total, done = sum(len(runs) for runs in best.values()), 0
    for (arm, budget), runs in best.items():
        found[arm, budget] = {}
        for run in runs:
            done += 1
            say(f"corpora, model {done} of {total}: {arm} at {budget:.3g} FLOPs, seed {run.seed}")
            found[arm, budget][run.seed] = corpora.measure(run, arm == "MoE", say)
    return found


def claims(found: Found, budgets: Sequence[float], at_hand: Sequence[str]) -> list[Trend]:
    """PEER below each other method, by the mean over corpora of the log of their ratio, a seed at a time."""
    words = [(budget, other) for budget in budgets for other in ("MoE", "PKM", "Dense")]

    def said(budget: float, other: str) -> str:
        return f"PEER's perplexity is below {other}'s at {budget:.3g} FLOPs, over the corpora at hand"

    if not at_hand:
        why = "no corpus is at hand: --data-dir names the folder that holds them"
        return [Trend(said(*at), "not resolved at this scale", why) for at in words]
    tests = []
    for budget, other in words:
        ours, theirs = found.get(("PEER", budget), {}), found.get((other, budget), {})
        values = [
            fmean(log(ours[seed][name].perplexity / theirs[seed][name].perplexity) for name in at_hand)
            for seed in sorted(ours.keys() & theirs.keys())
        ]
        tests.append(bounded(said(budget, other), values, high=0.0, unit=", the mean log of their ratio"))
    return judge(tests)


Cell = Callable[[Measured], float | None]


def perplexities(
    numbers: Mapping[str, Any], found: Found, budgets: Sequence[float], at_hand: Sequence[str]
) -> TextTable:
    """The paper's table, a row of ours above each of its rows."""
    rows = []
    for i, budget in enumerate(budgets):
        for arm, theirs in numbers["perplexity"].items():
            seeds = found.get((arm, budget), {})
            rows.append([arm, f"{budget:.3g}", "here", *_cells(seeds, at_hand, numbers, lambda m: m.perplexity, 2)])
            if arm == "MoE":
                cells = _cells(seeds, at_hand, numbers, lambda m: m.lookahead, 2)
                rows.append([f"{arm}, top-k: sees later tokens", f"{budget:.3g}", "here", *cells])
            rows.append([arm, f"{numbers['budgets'][i]:.3g}", "paper", *(fixed(x, 2) for x in theirs[i])])
    return TextTable("Perplexity, each method at its optimum", _columns(numbers), rows)


def ratios(numbers: Mapping[str, Any], found: Found, budgets: Sequence[float], at_hand: Sequence[str]) -> TextTable:
    """Perplexity over dense's of the same budget and corpus: what two tokenizers may be compared by."""
    rows = []
    for i, budget in enumerate(budgets):
        base, dense = found.get(("Dense", budget), {}), numbers["perplexity"]["Dense"][i]
        for arm, theirs in numbers["perplexity"].items():
            seeds = found.get((arm, budget), {})
            cells = []
            for name in numbers["corpora"]:
                both = sorted(seeds.keys() & base.keys()) if name in at_hand else []
                values = [seeds[s][name].perplexity / base[s][name].perplexity for s in both]
                cells.append(spread(values, 3) if name in at_hand else NO_DATA)
            rows.append([arm, f"{budget:.3g}", "here", *cells])
            paper = [fixed(x / y, 3) for x, y in zip(theirs[i], dense, strict=True)]
            rows.append([arm, f"{numbers['budgets'][i]:.3g}", "paper", *paper])
    return TextTable("Perplexity over dense's", _columns(numbers), rows)


def bits(found: Found, budgets: Sequence[float], at_hand: Sequence[str], numbers: Mapping[str, Any]) -> TextTable:
    """Bits per byte, which other tokenizers may be compared by."""
    rows = [
        [arm, f"{budget:.3g}", "here", *_cells(found.get((arm, budget), {}), at_hand, numbers, lambda m: m.bpb, 4)]
        for budget in budgets
        for arm in numbers["perplexity"]
    ]
    return TextTable("Bits per byte", _columns(numbers), rows)


def chosen(best: Mapping[tuple[str, float], Sequence[Record]]) -> TextTable:
    """Which runs stand for each method."""
    rows = [
        [
            arm,
            f"{budget:.3g}",
            str(runs[0].settings["model"]["d_model"]),
            str(len(runs[0].settings["model"]["blocks"])),
            si(runs[0].params),
            si(runs[0].forward_flops),
            si(runs[0].tokens),
            str(len(runs)),
        ]
        for (arm, budget), runs in best.items()
    ]
    columns = ("method", "FLOPs", "width", "blocks", "parameters", "FLOPs per token", "training tokens", "seeds")
    return TextTable("The sizes that stand for the methods: next to the optimum of the isoFLOP curve", columns, rows)


def _columns(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    return ("method", "FLOPs", "from", *(TITLES[name] for name in numbers["corpora"]))


def _cells(seeds: Seeds, at_hand: Sequence[str], numbers: Mapping[str, Any], value: Cell, digits: int) -> list[str]:
    cells = []
    for name in numbers["corpora"]:
        values = [x for corpora in seeds.values() if name in at_hand and (x := value(corpora[name])) is not None]
        cells.append(spread(values, digits) if name in at_hand else NO_DATA)
    return cells


REPRODUCTIONS = {"peer-table1": Reproduction(design, outcome)}
