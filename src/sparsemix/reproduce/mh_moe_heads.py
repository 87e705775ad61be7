"""The number of heads of MH-MoE, at equal FLOPs and equal parameters."""

from sparsemix.report.figures import Chart, Line
from sparsemix.report.numbers import fixed
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mh_moe_arms import M2, M3, SMOE, arm_of, base_of
from sparsemix.reproduce.mh_moe_tables import difference, effects_table, loss_table, router_note
from sparsemix.reproduce.trends import Claim, judge, ordering, ranking

HEADS = (1, 2, 3, 4, 6)
# With three experts a sub-token their width is the same whatever the number of heads, and 31 experts a head have the
# parameters of the sparse layer to the unit (at the paper's proportions). Two of the models are table 1's.
TOP_K = 3
NAMES = {h: {2: M2, 3: M3}.get(h, f"MH-MoE h={h}, equal parameters") for h in HEADS}
OTHERS = (
    "The paper trains other models: 8 experts, two a sub-token. By the count of arXiv:2411.16205 those with heads "
    "spend about four times the expert FLOPs of the one without, so its step from no head to two is not at equal "
    "FLOPs; ours is."
)


def design(scale: Scale) -> Design:
    """A sparse mixture, and every number of heads that the paper's width has at its cost."""
    base = base_of(scale)
    arms = [arm_of(SMOE, base.smoe())]
    return base.design([*arms, *(arm_of(name, base.heads(h, TOP_K)) for h, name in NAMES.items())])


def outcome(lab: Lab) -> Outcome:
    runs, paper = lab.runs, entry("mhmoe-heads").numbers["perplexity"]
    theirs = {SMOE: paper["no head"], **{name: paper[str(h)] for h, name in NAMES.items() if str(h) in paper}}
    perplexities = {name: [value] for name, value in theirs.items()}
    several = [h for h in HEADS if h > 1]
    tests = [ordering(Claim(f"{NAMES[h]}, is better than {SMOE}", runs[NAMES[h]], runs[SMOE])) for h in several]
    tests += [
        ordering(Claim("splitting helps: two heads are better than one", runs[NAMES[2]], runs[NAMES[1]])),
        ranking("loss falls with the number of heads from 2 to 6", [runs[NAMES[h]] for h in several]),
    ]
    names = {"no head": "X-MoE", "1": "X-MoE with head and merge, nothing split"}
    table = TextTable(
        "Perplexity of the paper (English, 8 experts)",
        ("model", "perplexity"),
        [[names.get(heads, f"MH-MoE h={heads}"), fixed(value, 2)] for heads, value in paper.items()],
    )
    against = [difference(NAMES[h], SMOE, runs, perplexities) for h in HEADS]
    tables = [loss_table("Loss by the number of heads", runs), effects_table(against, ["English"]), table]
    return Outcome(tables, judge(tests), [figure(lab)], [router_note(runs), OTHERS])


def figure(lab: Lab) -> Chart:
    """Mean test loss over the number of heads, each seed behind it; the sparse mixture as a line."""
    losses = {h: {r.seed: r.bpb for r in lab.runs[name]} for h, name in NAMES.items()}
    seeds = sorted(set.intersection(*(set(of) for of in losses.values())))
    means = [(float(h), sum(of.values()) / len(of)) for h, of in losses.items()]
    thin = [[(float(h), of[seed]) for h, of in losses.items()] for seed in seeds]
    sparse = [r.bpb for r in lab.runs[SMOE]]
    return Chart(
        "heads",
        "Loss by the number of heads",
        "heads",
        "test bits per byte",
        [Line("MH-MoE at equal FLOPs and parameters", 1, means, thin)],
        references=[(SMOE, sum(sparse) / len(sparse))],
        x_ticks=[float(h) for h in HEADS],
    )


REPRODUCTIONS = {"mhmoe-heads": Reproduction(design, outcome)}
