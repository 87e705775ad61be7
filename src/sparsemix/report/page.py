"""One self-contained HTML page from a comparison's result: no script, nothing fetched, every value may be missing."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsemix.durable import write_atomic
from sparsemix.report.figures import CSS
from sparsemix.report.held_out import found_in_train
from sparsemix.report.numbers import (
    DASH,
    Markup,
    escape,
    exponent,
    fixed,
    interval,
    is_number,
    si,
)
from sparsemix.report.palette import DARK, LIGHT, declarations
from sparsemix.report.plots import differences, learning_rates, loads, losses, passes, styles_of
from sparsemix.report.tables import (
    comparison_table,
    cost_table,
    experts_table,
    leak_table,
    predictor_table,
    ranked,
    sizing_table,
    speed_table,
    table,
)

Row = dict[str, Any]


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write the page of `result` (the content of result.json) to `path`; links to run folders are relative to it."""
    rows = result.get("rows") or []
    kinds = ", ".join(str(row.get("kind")) for row in rows) or DASH
    sections = [
        ("verdict", "Verdict", _verdict(result)),
        ("table", "Comparison", join(comparison_table(result), differences(result), speed_table(result))),
        ("loss-flops", "Loss against compute", losses(result, "flops")),
        ("loss-time", "Loss against time", losses(result, "wall_s")),
        ("lr", "Learning rates", learning_rates(result)),
        ("cost", "Cost", cost_table(rows)),
        ("routing", "Routing", _routing(result)),
        ("fairness", "What was held equal", _fairness(result)),
        ("data", "Data", _data(result)),
        ("reproduce", "Reproduce", _reproduce(result)),
    ]
    byline = " · ".join(
        [
            f"{si(result.get('budget_flops'), 'FLOP')} per run",
            *(str(result[key]) for key in ("hardware", "created") if result.get(key)),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(f"Equal-FLOP comparison: {kinds}", byline, sections))


def render(title: str, byline: str, sections: Sequence[tuple[str, str, str]], css: str = "") -> str:
    """A whole page of (id, heading, body) sections, the empty ones left out; `css` follows the rules of every page."""
    shown = [section for section in sections if section[2]]
    template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        css=css,
        light=declarations(LIGHT),
        dark=declarations(DARK),
        figures=CSS.read_text(encoding="utf-8"),
        byline=escape(byline),
        first=shown[0][0],
        contents="\n".join(f'<li><a href="#{id}">{heading}</a></li>' for id, heading, _ in shown),
        sections="\n".join(
            f'<section id="{id}">\n<h2>{heading}</h2>\n{body}\n</section>' for id, heading, body in shown
        ),
    )


def paragraph(text: object, css: str = "") -> Markup:
    """Text as a paragraph."""
    return Markup(f'<p class="{css}">{escape(text)}</p>')


def listed(items: Sequence[object], css: str = "") -> Markup:
    """Texts as a list."""
    return Markup(f'<ul class="{css}">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>')


def join(*parts: str) -> Markup:
    """The parts that are not empty, one after the other."""
    return Markup("\n".join(part for part in parts if part))


def _verdict(result: dict[str, Any]) -> Markup:
    rows = [row for row in ranked(result) if is_number(row.get("bpb"))]
    if not rows:
        return join(paragraph(f"{DASH} (no kind has a finite loss)", "headline"), warned(result.get("warnings") or []))
    best, dense = rows[0], next((row for row in rows if row.get("kind") == "dense"), None)
    against = f", against {fixed(dense['bpb'], 4)} for dense" if dense and dense is not best else ""
    headline = (
        f"With {si(result.get('budget_flops'), 'FLOP')} of training each, {best.get('kind')} has the lowest mean loss: "
        f"{fixed(best['bpb'], 4)} bits per byte{against}."
    )
    lines = []
    for row in [*rows, *(row for row in ranked(result) if row not in rows)]:
        if row.get("kind") != "dense" or "diverged" in str(row.get("verdict")):
            numbers = (
                f"{fixed(row.get('difference'), 4, signed=True)} {interval(row.get('difference_ci'), 4, signed=True)}"
            )
            lines.append(Markup(f"<b>{escape(row.get('kind'))}</b> {numbers}: {escape(row.get('verdict'))}"))
    note = "Difference from dense in bits per byte, 95\u00a0% confidence interval, verdict; negative is better."
    return join(
        paragraph(headline, "headline"),
        listed(lines, "verdicts") if lines else "",
        paragraph(note, "note") if lines else "",
        paragraph(result["limits"]) if result.get("limits") else "",
        paragraph(result.get("scope")),
        warned(result.get("warnings") or []),
    )


def warned(texts: Sequence[str]) -> Markup:
    """Warnings set apart; empty if there are none."""
    warnings = [Markup(f"<b>Warning:</b> {escape(text)}") for text in texts]
    return listed(warnings, "warnings") if warnings else Markup("")


EXPERTS = (
    "Usage is the share of experts with any gate mass; unevenness is the KL divergence of the experts' shares of gate "
    "mass from uniform, in nats, 0 when even. Both depend on the number of tokens they were measured on."
)


def _routing(result: dict[str, Any]) -> Markup:
    rows, styles = result.get("rows") or [], styles_of(result)
    parts: list[str] = [leak_table(rows), paragraph(EXPERTS, "note")]
    for i, row in enumerate(rows):
        kind, routing = row.get("kind"), row.get("routing") or {}
        if not any(routing.get(key) for key in ("passes", "predictor", "experts")):
            continue
        parts.append(Markup(f"<h3>{escape(kind)}</h3>"))
        parts.append(passes(row, f"passes-{i}", styles[str(kind)]))
        parts.append(predictor_table(row) if routing.get("predictor") else "")
        if routing.get("experts"):
            parts.append(f'<div class="pair">{loads(row, f"load-{i}", styles[str(kind)])}{experts_table(row)}</div>')
    return join(*parts)


def _fairness(result: dict[str, Any]) -> Markup:
    rows, epochs = result.get("rows") or [], result.get("epochs")
    seeds = {tuple(run.get("seed") for run in row.get("runs") or []) for row in rows}
    held = [
        *(result.get("fairness") or []),
        f"Training compute: {si(result.get('budget_flops'), 'FLOP')} for every run. A kind that spends fewer FLOPs per "
        "token reads more tokens.",
        "The text, its splits and the tokenizer: every kind read the same corpus (see Data).",
        "The seeds of the runs."
        if len(seeds) == 1
        else "Not the seeds: kinds ran with different ones (see the table).",
        "The effort spent on the learning rate: the same sweep for every kind, on validation loss."
        if result.get("tuned")
        else "Not the learning rate's quality: it was not tuned for each kind, which may favour some.",
    ]
    limits = [
        "Other sizes and budgets. The ranking may change with scale.",
        "Speed. Equal FLOPs are not equal seconds: times hold for this hardware and these kernels only.",
        "Other text, other tokenizers, or anything after pre-training.",
        "Settings other than the learning rate, which were not searched.",
    ]
    read = f"The training text was read {fixed(epochs, 2)} times." if is_number(epochs) else ""
    return join(
        listed(held),
        sizing_table(rows, result.get("budget_flops")),
        paragraph(read) if read else "",
        Markup("<h3>How FLOPs were counted</h3>"),
        paragraph(result.get("convention")),
        Markup("<h3>What this does not show</h3>"),
        listed(limits),
    )


def _data(result: dict[str, Any]) -> Markup:
    corpus = result.get("corpus") or {}
    splits = {**(corpus.get("splits") or {}), "evaluated": corpus.get("evaluated") or {}}
    lines = [
        [name, si(of.get("bytes"), "B"), si(of.get("documents")), si(of.get("tokens")), fixed(_per_token(of), 2)]
        for name, of in splits.items()
    ]
    facts = [
        ["sources", Markup("<br>".join(escape(source) for source in corpus.get("sources") or [None]))],
        ["size", f"{si(corpus.get('bytes'), 'B')} in {si(corpus.get('documents'))} documents"],
        ["read", corpus.get("read")],
        ["duplicates dropped", si(corpus.get("duplicates_dropped"))],
        ["held out", found_in_train(corpus.get("contamination"))],
        ["tokenizer", f"{corpus.get('tokenizer') or DASH}, vocabulary of {fixed(corpus.get('vocab_size'), 0)}"],
        ["SHA-256 fingerprint", _code(corpus.get("fingerprint"))],
    ]
    return join(
        _facts("The corpus.", facts),
        table("Splits, by document.", ["split", "size", "documents", "tokens", "bytes per token"], lines),
    )


def _per_token(split: dict[str, Any]) -> float | None:
    size, tokens = split.get("bytes"), split.get("tokens")
    return size / tokens if is_number(size) and is_number(tokens) and tokens else None


def _code(value: object) -> Markup:
    return Markup(DASH if value is None else f"<code>{escape(value)}</code>")


def _facts(caption: str, facts: Sequence[Sequence[object]]) -> Markup:
    return table(caption, ["what", "value"], facts, text=[1])


def _reproduce(result: dict[str, Any]) -> Markup:
    versions = [[name, version] for name, version in (result.get("versions") or {}).items()]
    if kernels := result.get("kernels"):
        versions.append(["kernels", ", ".join(map(" ".join, kernels.items()))])
    machine = [["hardware", result.get("hardware")], ["created", result.get("created")]]
    settings = [[name, _code(value)] for name, value in (result.get("settings") or {}).items()]
    runs = [
        [
            row.get("kind"),
            run.get("seed"),
            exponent(run.get("lr")),
            run.get("diverged") or fixed(run.get("bpb"), 4),
            link(run.get("folder")),
        ]
        for row in result.get("rows") or []
        for run in row.get("runs") or []
    ]
    command = result.get("command")
    return join(
        Markup(f"<pre><code>{escape(command)}</code></pre>"),
        _facts("Machine and versions.", [*machine, *versions]),
        table("Every run.", ["kind", "seed", "learning rate", "bits per byte", "folder"], runs, text=[4]),
        Markup(f"<details><summary>All settings</summary>{_facts('Settings.', settings)}</details>")
        if settings
        else "",
    )


def link(folder: Any) -> Markup | None:
    """A run's folder, as seen from the page; None if there is none."""
    return Markup(f'<a href="./{quote(str(folder))}/">{escape(folder)}</a>') if folder else None
