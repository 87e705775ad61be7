"""Tables 4 and 5 of MH-MoE: what its head and its merge layer do, in it and in other mixtures."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from sparsemix.report.records import Record
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mh_moe_arms import EXPERTS, FINE, H2, SMOE, Base, arm_of, base_of
from sparsemix.reproduce.mh_moe_corpora import CORPORA, note, paper_table, score
from sparsemix.reproduce.mh_moe_tables import Effect, difference, effects_table, loss_table
from sparsemix.reproduce.trends import Claim, Terms, contrast, judge, ordering

COLUMNS = [f"50k {corpus}" for corpus in CORPORA.values()]
WITH = " with head and merge"
# Names of the arms of table 4 that are no arm of table 1.
WIDE = f"{H2}, wide, without head and merge"
NEITHER, HEAD, MERGE = f"{H2}, neither", f"{H2}, head only", f"{H2}, merge only"
PAPER_NAMES = {NEITHER: "neither", HEAD: "head only", MERGE: "merge only", H2: "both"}
STEPS = (
    "As in the paper, models are compared after equal steps; what has more layers costs more FLOPs, which the table "
    "lists. The paper's numbers are after 50,000 of its 100,000 steps, ours after all."
)


def wide(base: Base) -> dict[str, Any]:
    """Two heads whose experts pay nothing for head and merge: with f = d_ff / 2 and 32 experts their FLOPs and
    parameters are those of `smoe`. The paper gives neither number; only this makes its column groups equal."""
    inner = base.moe(4 * EXPERTS, 2, base.d_ff // 2)
    return {"kind": "mh_moe", "num_heads": 2, "inner": inner}


def table4(scale: Scale) -> Design:
    """Every mixture without and with head and merge. Models of a column group have equal FLOPs; all take equal
    steps."""
    base = base_of(scale)
    plain = {SMOE: base.smoe(), FINE: base.fine(), WIDE: wide(base) | {"head": False, "merge": False}}
    one_head = {name: {"kind": "mh_moe", "num_heads": 1, "inner": plain[name]} for name in (SMOE, FINE)}
    without = [arm_of(name, layer) for name, layer in plain.items()]
    more = [arm_of(f"{name}{WITH}", layer) for name, layer in {**one_head, H2: wide(base)}.items()]
    return base.design([*without, *more])


def table5(scale: Scale) -> Design:
    """The model of table 1 whose layers are left out, for as many steps."""
    base = base_of(scale)
    layer = base.heads(2, 2, 8)
    both = arm_of(H2, layer)
    left_out = {
        NEITHER: {"head": False, "merge": False},
        HEAD: {"merge": False},
        MERGE: {"head": False},
    }
    arms = [arm_of(name, layer | without) for name, without in left_out.items()]
    return base.design([*arms, both])


def outcome4(lab: Lab) -> Outcome:
    paper, runs = entry("mhmoe-table4").numbers, lab.runs
    arms = {SMOE: SMOE, FINE: FINE, H2: WIDE}
    gains = {
        name: Effect(
            f"head and merge in {name}",
            [(1.0, runs[f"{name}{WITH}"]), (-1.0, runs[without])],
            _logs(paper["with"][name], paper["without"][name]),
        )
        for name, without in arms.items()
    }
    effects = [*gains.values(), _against(runs, FINE, "with", paper), _against(runs, FINE, "without", paper)]
    more = {
        name: contrast(f"they help {H2} more than {name}", [*gains[H2].terms, *_minus(gains[name].terms)])
        for name in (SMOE, FINE)
    }
    trends = judge(
        [
            contrast(f"head and merge help {H2}", gains[H2].terms),
            *more.values(),
            ordering(
                Claim(f"{H2} is better than {FINE} where both have them", runs[f"{H2}{WITH}"], runs[f"{FINE}{WITH}"])
            ),
        ]
    )
    scores = score(lab)
    models = {name: {"without": without, "with": f"{name}{WITH}"} for name, without in arms.items()}
    tables = [
        paper_table("Perplexity without and with head and merge", models, scores, paper),
        loss_table("Loss on the study's text", runs),
        effects_table(effects, COLUMNS),
    ]
    return Outcome(tables, trends, notes=[STEPS, note(lab, scores)], numbers={"perplexity": scores})


def _minus(terms: Terms) -> Terms:
    return [(-weight, records) for weight, records in terms]


def _logs(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [log(x) - log(y) for x, y in zip(a, b, strict=True)]


def _against(runs: Mapping[str, Sequence[Record]], name: str, group: str, paper: Mapping[str, Any]) -> Effect:
    """Two heads minus another mixture in one column group."""
    mine, other = (f"{H2}{WITH}", f"{name}{WITH}") if group == "with" else (WIDE, name)
    terms = [(1.0, runs[mine]), (-1.0, runs[other])]
    return Effect(f"{H2} minus {name}, {group} head and merge", terms, _logs(paper[group][H2], paper[group][name]))


def outcome5(lab: Lab) -> Outcome:
    runs = lab.runs
    paper = {arm: entry("mhmoe-table5").numbers["perplexity"][name] for arm, name in PAPER_NAMES.items()}
    pairs = [(H2, NEITHER), (HEAD, NEITHER), (MERGE, NEITHER), (H2, HEAD), (H2, MERGE), (HEAD, MERGE)]
    trends = judge(
        [
            ordering(Claim("both are better than neither", runs[H2], runs[NEITHER])),
            ordering(Claim("the head alone is better than neither", runs[HEAD], runs[NEITHER])),
            ordering(Claim("the merge alone is better than neither", runs[MERGE], runs[NEITHER])),
            ordering(Claim("the head alone is better than the merge alone", runs[HEAD], runs[MERGE])),
            ordering(Claim("both are better than the head alone", runs[H2], runs[HEAD])),
        ]
    )
    scores = score(lab)
    tables = [
        paper_table("Perplexity with layers left out", {arm: {"": arm} for arm in PAPER_NAMES}, scores, {"": paper}),
        loss_table("Loss on the study's text", runs),
        effects_table([difference(a, b, runs, paper) for a, b in pairs], COLUMNS),
    ]
    return Outcome(tables, trends, notes=[STEPS, note(lab, scores)], numbers={"perplexity": scores})


REPRODUCTIONS = {"mhmoe-table4": Reproduction(table4, outcome4), "mhmoe-table5": Reproduction(table5, outcome5)}
