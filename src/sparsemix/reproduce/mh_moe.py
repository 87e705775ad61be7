"""Tables 1 to 3 of MH-MoE: dense, sparse, fine-grained and multi-head models; with a shared expert; ternary."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mh_moe_arms import DENSE, FINE, H2, H3, M2, M3, SMOE, arm_of, base_of, matched, models
from sparsemix.reproduce.mh_moe_corpora import CORPORA, note, paper_table, score
from sparsemix.reproduce.mh_moe_tables import difference, effects_table, loss_table, router_note
from sparsemix.reproduce.trends import Claim, Test, judge, ordering, ranking

TERNARY = "model.precision=ternary"
# From the paper's worst to its best.
ORDER = (DENSE, SMOE, FINE, H2, H3)
HALF = (
    "At half of training the study's validation text alone is scored (a run keeps its last weights); the paper's 50k "
    "columns are of its own corpora."
)


def table1(scale: Scale) -> Design:
    """The paper's five models, and two with exactly the parameters of the sparse one."""
    base = base_of(scale)
    return base.design([arm_of(DENSE), *models(base), *matched(base)])


def table2(scale: Scale) -> Design:
    """A shared expert as wide as the dense feed-forward beside every sparse layer; on whole tokens in all of them."""
    base = base_of(scale)
    return base.design(models(base, shared_d_ff=base.d_ff))


def table3(scale: Scale) -> Design:
    """Every matrix ternary, head and merge as well."""
    base = base_of(scale)
    return base.design([arm_of(DENSE, changes=(TERNARY,)), *models(base, (TERNARY,))])


def outcome(name: str, notes: Sequence[str] = ()) -> Callable[[Lab], Outcome]:
    """What is said of a table: the paper's columns, our losses, the effects, the order."""

    def said(lab: Lab) -> Outcome:
        paper, runs = entry(name).numbers, lab.runs
        order = [arm for arm in ORDER if arm in runs]
        scores = score(lab)
        models = {arm: {"100k": arm} for arm in runs}
        effects = [difference(b, a, runs, paper["100k"]) for a, b in pairwise(order)]
        effects += [difference(H3, SMOE, runs, paper["100k"])]
        effects += [difference(arm, FINE, runs, {}) for arm in (M2, M3) if arm in runs]
        tables = [
            paper_table("Perplexity after 50,000 and 100,000 steps; ours at the end", models, scores, paper),
            loss_table("Loss on the study's text", runs),
            effects_table(effects, [f"100k {corpus}" for corpus in CORPORA.values()]),
        ]
        numbers = {"perplexity": scores, "tokens": {arm: [r.tokens for r in of] for arm, of in runs.items()}}
        return Outcome(
            tables, judge(claims(lab)), notes=[router_note(runs), HALF, note(lab, scores), *notes], numbers=numbers
        )

    return said


def claims(lab: Lab) -> list[Test]:
    """The order of the paper, its steps, and the order at parameters that are equal."""
    runs = lab.runs
    order = [arm for arm in ORDER if arm in runs]
    tests = [ranking(f"loss falls from {' to '.join(order)}", [runs[arm] for arm in order])]
    tests += [ordering(Claim(f"{b} is better than {a}", runs[b], runs[a])) for a, b in pairwise(order)]
    for arm in (M2, M3):
        if arm in runs:
            words = f"{arm}, is better than {FINE} (the paper's h=2 has 3.1 % fewer parameters, its h=3 3.1 % more)"
            tests.append(ordering(Claim(words, runs[arm], runs[FINE])))
    return tests


SHARED = (
    "The paper does not say whether a multi-head layer's shared expert sees tokens or sub-tokens: here it sees tokens, "
    "as only so is it of one size in all models."
)
RATE = (
    "Ternary models are trained at the learning rate of the float ones, as the paper gives none. Its ternary models "
    "lose 0.9 nats, where BitNet's own of 700 M parameters lost 0.04 at a tuned rate; ternary-gap tunes both sides."
)
REPRODUCTIONS = {
    "mhmoe-table1": Reproduction(table1, outcome("mhmoe-table1")),
    "mhmoe-table2": Reproduction(table2, outcome("mhmoe-table2", [SHARED])),
    "mhmoe-table3": Reproduction(table3, outcome("mhmoe-table3", [RATE])),
}
