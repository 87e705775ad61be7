"""What `sparsemix inspect` writes: inspect.json, inspect.html and a PNG of every figure."""

from pathlib import Path
from typing import Any

from sparsemix.durable import write_atomic
from sparsemix.inputs import checked_json
from sparsemix.report.inspect_plots import Drawn, expert_figures, mod_figures
from sparsemix.report.inspect_tables import DEPTHS, EXPERTS, correlations
from sparsemix.report.numbers import Markup, escape, fixed, si
from sparsemix.report.page import join, listed, paragraph, render, warned
from sparsemix.report.pictures import png

READING = (
    "Usage grows with the text: with few visits per expert it is a lower bound, and only runs measured on the same "
    "number of tokens compare.",
    "Unevenness is the KL divergence of the experts' shares from uniform, in nats: 0 when even, ln E when one expert "
    "gets everything. E · exp(−unevenness) is the number of effective experts.",
    "Weighted by picks, a pick of gate 0.01 counts as much as one of gate 1; weighted by gates, it counts little.",
    "An expert is active if its picks per token exceed a threshold, which no paper states: hence the curve. In "
    "multi-head MoE a token is several rows, so only the curve per sub-token compares with other layers.",
    "The loss of a token is that of predicting the next one, the routing that of the token itself. A correlation over "
    "tokens does not say that routing changes the loss: rare words, positions and documents move both.",
    "Intervals come from resampled documents; with fewer than 10 documents there are none.",
    "All of it is measured in evaluation mode: no token's routing saw a later token.",
)


def figures_of(run: dict[str, Any], prefix: str = "") -> list[Drawn]:
    """Every figure of a run."""
    return [*expert_figures(run, prefix), *mod_figures(run, prefix)]


def page_of(result: dict[str, Any]) -> str:
    """The self-contained page of an inspection."""
    sections = [(f"run-{i}", escape(run["run"]), _run(run, f"run-{i}-")) for i, run in enumerate(result["runs"])]
    sections.append(("reading", "How to read this", listed(READING)))
    runs = result["runs"]
    measured = f"{si(runs[0]['tokens'])} tokens of {', '.join(runs[0]['text'])}"
    return render(f"Routing statistics: {result['folder']}", measured, sections)


def _run(run: dict[str, Any], prefix: str) -> Markup:
    said = (
        f"{fixed(run['nats_per_token'], 4)} nats a token on {si(run['tokens'])} tokens in {si(run['documents'])} "
        f"documents of {', '.join(run['text'])}."
    )
    parts: list[str] = [paragraph(said), paragraph(run.get("read") or ""), warned(run["warnings"])]
    groups = (
        ("Experts", EXPERTS, expert_figures(run, prefix)),
        ("Mixture-of-Depths", DEPTHS, mod_figures(run, prefix)),
        ("Correlation with the loss", (correlations,), []),
    )
    for heading, makers, figures in groups:
        tables = [spec.html() for spec in (make(run) for make in makers) if spec.rows]
        if tables or figures:
            drawn = "".join(figure.html() for figure in figures)
            parts += [f"<h3>{heading}</h3>", *tables, f'<div class="pair">{drawn}</div>' if drawn else ""]
    return join(*parts)


def write_inspection(result: dict[str, Any], out: Path) -> None:
    """Write inspect.json, inspect.html and the pictures into `out`; all are made before the first is written."""
    files: dict[str, str | bytes] = {
        "inspect.json": checked_json(result, allow_nan=False),
        "inspect.html": page_of(result),
    }
    for run in result["runs"]:
        before = f"{run['run']}-" if len(result["runs"]) > 1 else ""
        files |= {f"{before}{figure.name}.png": png(figure.shape) for figure in figures_of(run)}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(out / name, content)
