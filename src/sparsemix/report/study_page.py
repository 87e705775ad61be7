"""One self-contained page of an isoFLOP study, with every figure as SVG, PNG and CSV beside it."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsemix.durable import write_atomic
from sparsemix.inputs import checked_json
from sparsemix.report import study_layers, study_losses, study_plots, study_tables
from sparsemix.report.figure_files import write_figure
from sparsemix.report.held_out import found_in_train
from sparsemix.report.numbers import Markup, escape, fixed, interval, is_number, si
from sparsemix.report.page import join, link, listed, paragraph, render, warned
from sparsemix.report.records import Record
from sparsemix.report.simple_page import drawn_figure
from sparsemix.report.study_details import TEXT, details
from sparsemix.report.study_plots import Analysis, Captioned, flops
from sparsemix.report.tables import experts_table, leak_table, predictor_table, table

FIGURES = "figures"


def write_study(
    analysis: Analysis, out: Path, records: Sequence[Record] = (), say: Callable[[str], None] = warnings.warn
) -> Path:
    """Write `out`/report.html, its figures below `out`/figures, and the analysis itself as `out`/analysis.json; returns
    the page's path. `records` are the runs that were analysed, in their order: without them the page has no links, no
    settings and no costs of layers. `say` gets a line for each damaged file that the page goes without."""
    page = Page(analysis, details(records, out, say) if records else None)
    text = page.html()
    out.mkdir(parents=True, exist_ok=True)
    for shape in page.shapes:
        write_figure(shape, out / FIGURES)
    write_atomic(out / "analysis.json", checked_json(analysis))
    write_atomic(out / "report.html", text)
    return out / "report.html"


class Page:
    """The page while it is made. `html` fills `shapes` with the figures that it shows."""

    def __init__(self, analysis: Analysis, about: dict[str, Any] | None) -> None:
        self.about = about
        links = about["links"] if about else []
        runs = [
            {**run, "link": at}
            for run, at in zip(analysis["runs"], links or [None] * len(analysis["runs"]), strict=True)
        ]
        self.analysis = {**analysis, "runs": runs}
        self.shapes: list[Any] = []

    def html(self) -> str:
        a = self.analysis
        sections = [
            ("summary", "Summary", self._summary()),
            ("curves", "IsoFLOP curves", self._curves()),
            ("optima", "Optima and equal loss", self._optima()),
            ("relative", f"Relative to {escape(a['baseline'])}", self._pair(study_plots.overlays(a))),
            ("compute", "Loss against compute and time", self._compute()),
            ("cost", "FLOPs and memory of the layers", self._cost()),
            ("routing", "Routing", self._routing()),
            ("settings", "What was held equal, and what differs", self._settings()),
            ("limits", "What this does not show", listed(a["does_not_show"])),
            ("data", "Data", self._data()),
            ("reproduce", "Reproduce", self._reproduce()),
            ("runs", "Runs", self._runs()),
        ]
        budgets = ", ".join(map(flops, a["budgets"]))
        seen = [*(self.about["hardware"] if self.about else ()), a["created"]]
        css = Path(__file__).with_name("study.css").read_text(encoding="utf-8") + _switch_rules(a)
        return render(a["title"], " · ".join([f"{budgets} per run", *seen]), sections, css)

    def _one(self, drawn: Captioned) -> Markup:
        self.shapes.append(drawn.shape)
        return drawn_figure(drawn.shape, drawn.caption, FIGURES)

    def _pair(self, drawn: Sequence[Captioned], css: str = "") -> Markup:
        return _beside([self._one(one) for one in drawn], css)

    def _summary(self) -> Markup:
        a, base = self.analysis, self.analysis["baseline"]
        lines = [_gap(q) for q in a["quantities"] if q["arm"] != base]
        note = (
            f"Loss next to the optimum minus {base}'s at the same budget, 95\u00a0% interval, verdict; negative is "
            "better."
        )
        return join(
            paragraph(_headline(a), "headline"),
            listed(lines, "verdicts") if lines else "",
            paragraph(note, "note") if lines else "",
            warned(a["warnings"]),
        )

    def _curves(self) -> Markup:
        a = self.analysis
        sizes = study_plots.sizes_known(a)
        parts: list[str] = [
            paragraph(
                "Each mark is a run, each colour a budget. A star is the optimum of a parabola in the logarithm of the "
                "forward FLOPs per token, with its 95\u00a0% interval; on other measures of size the same parabola is "
                "drawn."
            ),
            _switch(sizes) if len(sizes) > 1 else "",
        ]
        parts += [self._pair(study_plots.isoflop(a, size), f" by by-{size.key}") for size in sizes]
        against = study_plots.optimum_against_budget(a)
        return join(
            *parts, Markup("<h3>Optimum against budget</h3>") if against else "", self._one(against) if against else ""
        )

    def _optima(self) -> Markup:
        dots = study_plots.gaps(self.analysis)
        tables = [spec.html() for spec in study_tables.result_tables(self.analysis)]
        return join(self._one(dots) if dots else "", *tables)

    def _compute(self) -> Markup:
        envelope = study_losses.envelope(self.analysis)
        return join(self._one(envelope) if envelope else "", self._pair(study_losses.against_time(self.analysis)))

    def _cost(self) -> Markup:
        if not self.about:
            return paragraph(
                "Not known: this page was made without the folders of its runs. `sparsemix report` reads them."
            )
        layers = self.about["layers"]
        drawn = study_layers.costs(self.analysis, layers)
        said = [study_layers.constant(self.analysis, layers)]
        if not any(of["activation_bytes"] for of in layers):
            said.append("Activation memory was not measured by these runs.")
        return join(self._pair(drawn), *map(paragraph, filter(None, said)))

    def _routing(self) -> Markup:
        a, style = self.analysis, study_plots.styles(self.analysis)
        rows = [study_layers.routing_row(run) for run in study_losses.largest_optima(a).values()]
        routed = [row for row in rows if study_layers.routes(row)]
        if not routed:
            return paragraph("No run of this study routes.")
        parts: list[str] = [
            paragraph("Of each arm the first of the runs next to its optimum at the largest budget."),
            leak_table(rows),
        ]
        for row in routed:
            arm = row["kind"]
            tables = [experts_table(row)] if row["routing"].get("experts") else []
            shown = [*(self._one(drawn) for drawn in study_layers.routing(arm, style[arm], row)), *tables]
            parts += [Markup(f"<h3>{escape(arm)}</h3>"), _beside(shown)]
            parts += [predictor_table(row)] if row["routing"].get("predictor") else []
            parts += self._looked_into(arm, row["link"])
        return join(*parts)

    def _looked_into(self, arm: str, run: str | None) -> list[str]:
        """What `inspect` and `generate` found in the run, or how to have it."""
        if not self.about or run is None:
            return []
        found = self.about["inspections"].get(run)
        parts: list[str] = [self._pair(study_layers.inspected(arm, found))] if found else []
        missing = [] if found else [("gates, router weights and activation", f"sparsemix inspect {run}")]
        if run in self.about["texts"]:
            page = f'<a href="./{escape(run)}/{TEXT}">which blocks and experts took each token of a text</a>'
            parts.append(Markup(f"<p>Token by token: {page}.</p>"))
        else:
            missing.append(
                ("which blocks and experts took each token", f'sparsemix generate {run} --prompt "..." --show routing')
            )
        commands = [Markup(f"{escape(what)}: <code>{escape(command)}</code>") for what, command in missing]
        return (
            [
                *parts,
                paragraph("Not measured yet; run these in this folder, then report again:", "note"),
                listed(commands, "note"),
            ]
            if missing
            else parts
        )

    def _settings(self) -> Markup:
        parts: list[str] = [study_tables.rates(self.analysis).html()]
        if self.about:
            arms = self.analysis["arms"]
            rows = [[name, *(values.get(arm) for arm in arms)] for name, values in self.about["differences"]]
            caption = (
                "Settings that differ between the arms, told at the width that most arms have in common. All others "
                "are equal, but for seed, learning rate and budget, which the table above has."
            )
            parts.append(table(caption, ["setting", *arms], rows, text=range(1, len(arms) + 1)))
        return join(*parts)

    def _data(self) -> Markup:
        corpus = self.analysis["corpus"]
        facts = [
            ["text", ", ".join(corpus.get("text") or []) or None],
            ["read", corpus.get("read")],
            ["training tokens", si(corpus.get("train_tokens"))],
            ["held out", found_in_train(corpus.get("contamination"))],
            ["vocabulary", fixed(corpus.get("vocab_size"), 0)],
            ["fingerprint", Markup(f"<code>{escape(corpus.get('fingerprint'))}</code>")],
        ]
        return table("The corpus.", ["what", "value"], facts, text=[1])

    def _reproduce(self) -> Markup:
        a = self.analysis
        machine = [["hardware", at] for at in self.about["hardware"]] if self.about else []
        versions = list(self.about["versions"].items()) if self.about else []
        if self.about and self.about["kernels"]:
            versions.append(("kernels", ", ".join(map(" ".join, self.about["kernels"].items()))))
        return join(
            Markup(f"<pre><code>{escape(a['command'])}</code></pre>") if a["command"] else "",
            paragraph(f"How FLOPs were counted: {a['convention']}."),
            table(
                "Machine and versions.", ["what", "value"], [*machine, *versions, ["created", a["created"]]], text=[1]
            ),
        )

    def _runs(self) -> Markup:
        spec, runs = study_tables.runs(self.analysis), self.analysis["runs"]
        rows = [[*row[:-1], link(run["link"]) or row[-1]] for row, run in zip(spec.rows, runs, strict=True)]
        return table(spec.caption, spec.columns, rows, text=spec.text)


def _beside(parts: Sequence[str], css: str = "") -> Markup:
    """Parts in columns where there is room; one alone takes a figure's usual width."""
    kind = "pair" if len(parts) > 1 else "single"
    return Markup(f'<div class="{kind}{css}">{"".join(parts)}</div>') if parts else Markup("")


def _gap(q: dict[str, Any]) -> Markup:
    """An arm's difference from the baseline, where there is one, and its verdict."""
    at = f"<b>{escape(q['arm'])}</b> at {flops(q['budget'])}: "
    if q.get("gap_nats") is not None:
        at += f"{fixed(q['gap_nats'], 4, True)} {interval(q.get('gap_nats_ci'), 4, True)} nats: "
    return Markup(at + escape(q.get("verdict")))


def _headline(analysis: Analysis) -> str:
    base, budget = analysis["baseline"], analysis["budgets"][-1]
    found = [q for q in analysis["quantities"] if q["budget"] == budget and is_number(q.get("nats"))]
    if not found:
        return f"At {flops(budget)} of training no arm's sizes bracket an optimum, so none is known at its best."
    best = min(found, key=lambda q: q["nats"])
    dense = next((q for q in found if q["arm"] == base and q is not best), None)
    against = f", against {fixed(dense['nats'], 4)} for {base}" if dense else ""
    return (
        f"At {flops(budget)} of training, {best['arm']} has the lowest loss at its optimal size: "
        f"{fixed(best['nats'], 4)} nats per token ({fixed(best.get('bpb'), 4)} bits per byte){against}."
    )


def _switch(sizes: Sequence[study_plots.Size]) -> Markup:
    """Radio buttons that choose the measure of size, without a script."""
    on = ' checked=""'
    labels = "".join(
        f'<label><input type="radio" name="size" id="size-{size.key}"{"" if i else on} />{size.label}</label>'
        for i, size in enumerate(sizes)
    )
    return Markup(f'<fieldset class="switch"><legend>Size measured in</legend>{labels}</fieldset>')


def _switch_rules(analysis: Analysis) -> str:
    sizes = study_plots.sizes_known(analysis)
    return "".join(
        f"main:has(#size-{size.key}:checked) .by:not(.by-{size.key}) {{ display: none; }}\n" for size in sizes
    )
