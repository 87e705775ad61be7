"""The gap of 1.58-bit weights: loss at each precision's own best rate, bytes, and speed of generation."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from sparsemix.report.numbers import DASH, exponent, fixed, interval, percent, si
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.report.stats import smallest_visible
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mh_moe_arms import DENSE, H2, arm_of, base_of
from sparsemix.reproduce.mh_moe_tables import loss_table, nats_per_bit
from sparsemix.reproduce.ternary_decoding import FLOAT_FORMS, TERNARY_FORMS, Decoding, decoding
from sparsemix.reproduce.trends import Claim, Terms, Test, contrast, judge, ordering, weighted

FLOAT, TERNARY = ", float", ", 1.58 bit"
KINDS = (DENSE, H2)
# The same norms before the last matrix on both sides, so that the weights alone differ.
FLOAT_PRECISION = "model.precision={weights: float, sub_norm: true}"
TERNARY_PRECISION = "model.precision=ternary"
NOTE = (
    "Both precisions have the norm before the last matrix (SubLN), and each model its own learning rate from a sweep. "
    "FLOPs count ternary products as float ones. Embedding, norms and routers are never ternary, so the smaller the "
    "model, the larger their share of its bytes."
)
SPEED = (
    "Speed: greedy tokens of one sequence, models taking turns, median over rounds. Packed models decode from two-bit "
    "weights. A small model spends its time on calls rather than on reading weights, so this says little of large ones."
)


def design(scale: Scale) -> Design:
    """A dense and a multi-head model, each float and ternary, at the rate of a sweep of its own."""
    base = base_of(scale)
    layers = {DENSE: None, H2: base.heads(2, 2, 8)}
    arms = [
        arm_of(f"{kind}{name}", layers[kind], (precision,))
        for kind in KINDS
        for name, precision in ((FLOAT, FLOAT_PRECISION), (TERNARY, TERNARY_PRECISION))
    ]
    return base.design(arms, sweep=True)


def outcome(lab: Lab) -> Outcome:
    # Runs that only tried a rate are no seeds of a comparison.
    runs = {arm: [r for r in records if r.role != "rate"] for arm, records in lab.runs.items()}
    measured = decoding(lab.out / "ternary-gap" / "decoding.json", {a: of[0] for a, of in runs.items()}, lab.say)
    tests = [
        *(ordering(Claim(f"{k}: float is better than 1.58 bit", runs[k + FLOAT], runs[k + TERNARY])) for k in KINDS),
        contrast(f"{H2} loses less to 1.58 bit than {DENSE}", [*_gap(runs, H2), *_times(-1, _gap(runs, DENSE))]),
        *(_faster(kind, measured) for kind in KINDS),
    ]
    tables = [gap_table(runs), published(), bytes_table(measured), speed_table(measured)]
    tables += [rates(runs, lab.runs), loss_table("Loss on the study's text", runs)]
    notes = [NOTE, SPEED, f"Measured on {measured.hardware}."]
    return Outcome(tables, judge(tests), notes=notes, numbers={"decoding": measured._asdict()})


def _gap(runs: Mapping[str, Sequence[Record]], kind: str) -> Terms:
    """Loss of 1.58 bit minus that of float."""
    return [(1.0, runs[kind + TERNARY]), (-1.0, runs[kind + FLOAT])]


def _times(factor: float, terms: Terms) -> Terms:
    return [(factor * weight, records) for weight, records in terms]


def gap_table(runs: Mapping[str, Sequence[Record]]) -> TextTable:
    """Loss of 1.58 bit minus loss of float, in nats per token and in percent of the float model's."""
    rows = []
    for kind in KINDS:
        terms = _gap(runs, kind)
        d, unit = weighted(terms), nats_per_bit([r for _, records in terms for r in records])
        cells = [DASH] * 4
        if d is not None:
            at, float_bpb = d.interval, sum(r.bpb for r in runs[kind + FLOAT]) / len(runs[kind + FLOAT])
            seen = smallest_visible(at, len(KINDS)) * unit if at.seeds_seen else None
            bounds = (at.low * unit, at.high * unit) if at.seeds_seen else None
            cells = [fixed(at.estimate * unit, 4, True), interval(bounds, 4, True)]
            cells += [percent(at.estimate / float_bpb), fixed(seen, 4)]
        rows.append([kind, *cells])
    columns = ("model", "gap, nats per token", "95 % interval", "gap over float loss", "could have seen")
    return TextTable("What 1.58 bit costs", columns, rows)


def published() -> TextTable:
    """The papers' gaps: perplexities as nats per token."""
    rows = []
    for model, (real, ternary) in entry("ternary-gap").numbers["perplexity"].items():
        gap = log(ternary) - log(real)
        rows.append([model, fixed(real, 2), fixed(ternary, 2), fixed(gap, 4, True), percent(gap / log(real))])
    columns = ("model", "perplexity, float", "perplexity, 1.58 bit", "gap, nats per token", "gap over float loss")
    return TextTable("What 1.58 bit costs in the papers", columns, rows)


def bytes_table(measured: Decoding) -> TextTable:
    """Bytes of the saved weights and of the weights in memory, for every form of a model."""
    columns = ("model", "weights", "bytes on disk", "bytes in memory", "of which ternary", "memory, bf16 over this")
    rows = []
    for kind in KINDS:
        real = measured.forms[kind + FLOAT]["bf16"]
        for arm in (kind + FLOAT, kind + TERNARY):
            for form, m in measured.forms[arm].items():
                share = percent(m["ternary_bytes"] / m["memory_bytes"])
                times = f"{fixed(real['memory_bytes'] / m['memory_bytes'], 2)} x"
                rows.append([arm, form, si(m["disk_bytes"], "B"), si(m["memory_bytes"], "B"), share, times])
    paper = entry("ternary-gap").numbers["memory"]
    rows += [[f"BitNet b1.58 {size}, paper", DASH, DASH, DASH, DASH, f"{fixed(x, 2)} x"] for size, x in paper.items()]
    return TextTable("Bytes", columns, rows)


def speed_table(measured: Decoding) -> TextTable:
    """Tokens a second of every form, and times the float model's best form."""
    columns = ("model", "weights", "tokens a second (median)", "quartiles", "times the float model")
    rows = []
    for kind in KINDS:
        best = max(measured.median(kind + FLOAT, form) for form in FLOAT_FORMS)
        for arm in (kind + FLOAT, kind + TERNARY):
            for form in measured.forms[arm]:
                median, quartiles = measured.median(arm, form), measured.quartiles(arm, form)
                rows.append([arm, form, fixed(median, 1), interval(quartiles, 1), f"{fixed(median / best, 2)} x"])
    paper = entry("ternary-gap").numbers["latency"]
    rows += [[f"BitNet b1.58 {size}, paper (GPU)", DASH, DASH, DASH, f"{fixed(x, 2)} x"] for size, x in paper.items()]
    return TextTable("Speed of generation", columns, rows)


def _faster(kind: str, measured: Decoding) -> Test:
    """That 1.58 bit decodes faster than float, each in its faster form, by a sign test over rounds."""
    words = f"{kind}: 1.58 bit decodes faster than float (on this machine, one sequence)"
    real, ternary = (
        measured.rounds(arm, max(forms, key=lambda form: measured.median(arm, form)))
        for arm, forms in ((kind + FLOAT, FLOAT_FORMS), (kind + TERNARY, TERNARY_FORMS))
    )
    return sign_test(words, [b / a for a, b in zip(real, ternary, strict=True)])


def sign_test(words: str, ratios: Sequence[float]) -> Test:
    """That a ratio of two speeds, measured in the same round, exceeds 1: two-sided binomial test of its sign."""
    from scipy import stats

    wins, decided = sum(r > 1 for r in ratios), sum(r != 1 for r in ratios)
    p = float(stats.binomtest(wins, decided).pvalue) if decided else 1.0
    middle = sorted(ratios)[len(ratios) // 2]
    return Test(words, wins * 2 > decided, p, f"{middle:.3g} x, faster in {wins} of {len(ratios)} rounds")


def rates(runs: Mapping[str, Sequence[Record]], tried: Mapping[str, Sequence[Record]]) -> TextTable:
    """The learning rate of every model, and what its sweep tried."""
    rows = []
    for arm, records in runs.items():
        losses = {r.lr: r.validation_bpb for r in tried[arm] if r.role == "rate"}
        swept = ", ".join(f"{exponent(lr)}: {fixed(losses[lr], 4)}" for lr in sorted(losses)) or DASH
        rows.append([arm, ", ".join(sorted({exponent(r.lr) for r in records})), swept])
    columns = ("model", "learning rate", "tried: validation bits per byte, one seed")
    return TextTable("Learning rates, from each model's sweep", columns, rows)


REPRODUCTIONS: dict[str, Any] = {"ternary-gap": Reproduction(design, outcome)}
