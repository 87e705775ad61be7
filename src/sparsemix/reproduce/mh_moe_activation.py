"""Activation of experts in MH-MoE: the share of them that are used, over the threshold that the paper does not give."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from sparsemix.evaluate.routing import STATED, THRESHOLDS, spread
from sparsemix.report.figures import Chart, Line
from sparsemix.report.numbers import DASH, fixed, percent
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mh_moe_arms import FINE, H2, H3, arm_of, base_of, models
from sparsemix.reproduce.mh_moe_tables import loss_table
from sparsemix.reproduce.trends import Test, bounded, judge

# As in the paper: 32 experts and two picks in both, four heads in one.
SPARSE, HEADS = "SMoE, 32 experts, top-2", "MH-MoE h=4, 32 experts, top-2"
NUM_EXPERTS, TOP_K, NUM_HEADS = 32, 2, 4
METRIC = (
    "An expert is active if its picks divided by the tokens exceed a threshold (paper: below 1, not given), over all "
    "experts of all layers. A token of h heads is h rows, each with picks of its own, so per token the metric grows "
    "h-fold by itself; per row it does not. The claims compare the mean share over thresholds from 1e-5 to 1, evenly "
    "in the logarithm. Measured on the study's test text."
)


class Layer(NamedTuple):
    """Picks of one layer on the test text: by expert and row, and its rows a token."""

    picks_per_row: np.ndarray
    rows_per_token: int

    def share(self, threshold: float, per_row: bool) -> float:
        """Share of the experts whose picks per token, or per row, exceed the threshold."""
        return float((self.picks_per_row * (1 if per_row else self.rows_per_token) > threshold).mean())


def design(scale: Scale) -> Design:
    """The mixtures of table 1, and a pair as in the first paper at the same FLOPs. The heads of that pair
    have fewer parameters: at equal ones they would have more experts, and the metric depends on how many there are."""
    base = base_of(scale)
    sparse = base.moe(NUM_EXPERTS, TOP_K, base.d_ff // TOP_K)
    heads = {**(layer := base.heads(NUM_HEADS, TOP_K)), "inner": {**layer["inner"], "num_experts": NUM_EXPERTS}}
    return base.design([*models(base), arm_of(SPARSE, sparse), arm_of(HEADS, heads)])


def layers_of(record: Record) -> list[Layer]:
    """Every expert layer of a run, by the statistics of its test."""
    found = []
    for path, said in record.result["routing"]["experts"].items():
        *_, outer, own = _along(record.settings["model"], path)
        heads = outer["num_heads"] if outer.get("kind") == "mh_moe" else 1
        found.append(Layer(np.array(said["load"]) * own["top_k"], heads))
    return found


def _along(model: Mapping[str, Any], path: str) -> Iterator[Any]:
    """The settings along a layer's path, such as blocks.1.ffn.inner."""
    at: Any = model
    for name in path.split("."):
        at = at[int(name)] if name.isdigit() else at[name]
        if isinstance(at, dict):
            yield at


def active(record: Record, threshold: float, per_row: bool = False) -> float:
    """Share of active experts over all layers, which have equally many."""
    return fmean(layer.share(threshold, per_row) for layer in layers_of(record))


def over_thresholds(record: Record, per_row: bool) -> list[float]:
    """The share of active experts at each of THRESHOLDS (1e-5 to 1, evenly in the logarithm)."""
    layers = layers_of(record)
    return [fmean(layer.share(t, per_row) for layer in layers) for t in THRESHOLDS]


def as_published(runs: Sequence[Record], share: float) -> float:
    """The threshold at which the runs' mean share of active experts is nearest to `share`; the smallest of several."""
    return float(THRESHOLDS[int(np.abs(np.array(_mean_curve(runs, False)) - share).argmin())])


def outcome(lab: Lab, thresholds: Sequence[float] = STATED) -> Outcome:
    """`thresholds`: those that the table has columns for; the figures show the curve over all."""
    runs, paper = lab.runs, entry("mhmoe-activation").numbers
    found = as_published(runs[SPARSE], paper["smoe"])
    columns = ["model", "experts a layer", "rows a token"]
    columns += [f"{of}, above {t:g}" for t in (*thresholds, float(f"{found:.3g}")) for of in ("per token", "per row")]
    rows = [[arm, *_sizes(records), *_shares(records, (*thresholds, found))] for arm, records in runs.items()]
    for name, share in (("paper, SMoE", paper["smoe"]), ("paper, MH-MoE", paper["mh_moe"])):
        rows.append([name, str(paper["experts"]), DASH, *[DASH] * (2 * len(thresholds)), percent(share, 2), DASH])
    note = (
        f"The last two columns are at {found:.2g}, where {SPARSE}, has as nearly as can be the paper's "
        f"{percent(paper['smoe'], 2)} for SMoE; the paper's own numbers stand there, at its unknown threshold."
    )
    tables = [
        TextTable("Share of active experts", columns, rows),
        evenness(runs),
        loss_table("Loss on the study's text", runs),
    ]
    curves = {arm: [_mean_curve(records, per_row) for per_row in (False, True)] for arm, records in runs.items()}
    numbers = {
        "thresholds": THRESHOLDS.tolist(),
        "active": {arm: {"per_token": token, "per_row": row} for arm, (token, row) in curves.items()},
    }
    figures = [_figure(curves, per_row) for per_row in (False, True)]
    return Outcome(tables, judge(claims(lab)), figures, [METRIC, note], numbers)


def _mean_curve(records: Sequence[Record], per_row: bool) -> list[float]:
    return np.mean([over_thresholds(record, per_row) for record in records], axis=0).tolist()


def _sizes(records: Sequence[Record]) -> list[str]:
    layer = layers_of(records[0])[0]
    return [str(len(layer.picks_per_row)), str(layer.rows_per_token)]


def _shares(records: Sequence[Record], thresholds: Sequence[float]) -> list[str]:
    return [percent(fmean(active(r, t, how) for r in records)) for t in thresholds for how in (False, True)]


def evenness(runs: Mapping[str, Sequence[Record]]) -> TextTable:
    """What needs no threshold: entropy of the load over ln E, and the busiest expert's load over the mean."""
    rows = []
    for arm, records in runs.items():
        said = [spread(layer.picks_per_row) for record in records for layer in layers_of(record)]
        entropy, busiest = (fmean(s[name] for s in said) for name in ("normalised_entropy", "max_over_mean"))
        rows.append([arm, fixed(entropy, 3), fixed(busiest, 2)])
    return TextTable("Evenness, which needs no threshold", ("model", "entropy over ln E", "busiest over mean"), rows)


def claims(lab: Lab) -> list[Test]:
    """The paper's claim by its own metric and by the one that heads do not inflate, for its pair and for table 1's."""
    pairs = ((HEADS, SPARSE), (H2, FINE), (H3, FINE))
    ways = ((False, "per token, as in the paper"), (True, "per row"))
    return [_larger(a, b, lab.runs, per_row, words) for per_row, words in ways for a, b in pairs]


def _larger(more: str, less: str, runs: Mapping[str, Sequence[Record]], per_row: bool, how: str) -> Test:
    words = f"{more}, activates more of its experts than {less} ({how})"
    mine, theirs = ({r.seed: fmean(over_thresholds(r, per_row)) for r in runs[arm]} for arm in (more, less))
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if differences and not any(differences):
        return Test(words, False, 1.0, f"no difference in any of {len(differences)} seeds")
    return bounded(words, differences, low=0.0)


def _figure(curves: Mapping[str, Sequence[Sequence[float]]], per_row: bool) -> Chart:
    of = "row" if per_row else "token"
    lines = [
        Line(arm, i, [(float(t), 100 * share) for t, share in zip(THRESHOLDS, both[per_row], strict=True)])
        for i, (arm, both) in enumerate(curves.items())
    ]
    title = f"Share of experts with more picks per {of} than a threshold"
    return Chart(f"activation-per-{of}", title, f"threshold, picks per {of}", "active experts (%)", lines, log_x=True)


REPRODUCTIONS = {"mhmoe-activation": Reproduction(design, outcome)}
