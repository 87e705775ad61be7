"""The figures of a study about its layers: FLOPs and activation memory against their sizes, and how they route."""

from collections.abc import Callable
from typing import Any

from sparsemix.report.figures import Bars, Chart, Line
from sparsemix.report.inspect_plots import expert_figures, mod_figures
from sparsemix.report.numbers import is_number, si
from sparsemix.report.plots import load_caption, load_chart
from sparsemix.report.study_plots import Analysis, Captioned, short, slug, styles

SIZES = (("d_ff", "width of a feed-forward or of one expert (d_ff)"), ("num_experts", "number of experts"))
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("forward_flops", "forward FLOPs per token", short),
    ("activation_bytes", "activation memory per token", lambda value: si(value, "B")),
)


def costs(analysis: Analysis, layers: list[dict[str, Any]]) -> list[Captioned]:
    """FLOPs and memory of a token against the layer's width and its number of experts: one point a size that was run;
    `layers` as `details` gives them. An arm whose runs do not differ in a size has no line."""
    drawn, style = [], styles(analysis)
    for size, x_label in SIZES:
        for cost, y_label, y_text in COSTS:
            lines = []
            for arm in analysis["arms"]:
                points = {
                    (of[size], of[cost])
                    for run, of in zip(analysis["runs"], layers, strict=True)
                    if run["arm"] == arm and is_number(of[size]) and is_number(of[cost])
                }
                if len({x for x, _ in points}) > 1:
                    lines.append(Line(arm, style[arm], sorted(points)))
            if lines:
                title = f"{y_label[0].upper()}{y_label[1:]} against {size}"
                chart = Chart(
                    f"{cost}-{size}".replace("_", "-"), title, x_label, y_label, lines, log_x=True, log_y=True,
                    x_text=short, y_text=y_text,
                )  # fmt: skip
                drawn.append(Captioned(chart, _caption(cost, size)))
    return drawn


def constant(analysis: Analysis, layers: list[dict[str, Any]]) -> str:
    """The sizes in which the runs of an arm do not differ, in words; empty if there are none."""
    said = []
    for size, _ in SIZES:
        for arm in analysis["arms"]:
            pairs = zip(analysis["runs"], layers, strict=True)
            values = {of[size] for run, of in pairs if run["arm"] == arm and is_number(of[size])}
            if len(values) == 1:
                said.append(f"{size} of {arm} ({values.pop()})")
    return f"Not drawn, as all runs have the same: {', '.join(said)}." if said else ""


def _caption(cost: str, size: str) -> str:
    how = (
        "FLOPs by analysis of the settings, the whole model."
        if cost == "forward_flops"
        else "Measured: what PyTorch keeps of one forward pass for the backward pass, the whole model, without weights."
    )
    grown = "Width, depth and heads grow along with it." if size == "d_ff" else "Other sizes may differ between points."
    return f"{how} A point a size that was run. {grown}"


def routing_row(run: dict[str, Any]) -> dict[str, Any]:
    """A run of the analysis as the tables of a comparison's kinds want it."""
    ahead = run.get("lookahead_bpb")
    leak = ahead - run["bpb"] if is_number(ahead) else None
    return {**run, "kind": run["arm"], "leak": leak, "routing": run.get("routing") or {}}


def routes(run: dict[str, Any]) -> bool:
    """Whether the run's own evaluation says anything of routing."""
    return any((run.get("routing") or {}).get(key) for key in ("passes", "predictor", "experts"))


def routing(arm: str, style: int, run: dict[str, Any]) -> list[Captioned]:
    """What a run's own evaluation says of its routing."""
    told, drawn = run.get("routing") or {}, []
    if (load := load_chart(told.get("experts") or {}, f"load-{slug(arm)}", arm, style)) is not None:
        drawn.append(Captioned(load, load_caption(load)))
    if counts := told.get("passes"):
        blocks = len(counts) - 1
        title, x_label = f"{arm}: tokens by number of routed blocks", "routed blocks that processed the token"
        bars = Bars(f"passes-{slug(arm)}", title, x_label, counts, style)
        text = f"{arm}: how many of its {blocks} routed blocks processed a token ({si(sum(counts))} tokens)."
        drawn.append(Captioned(bars, text))
    return drawn


def inspected(arm: str, inspection: dict[str, Any]) -> list[Captioned]:
    """The figures of `sparsemix inspect`, where it was run: gates, activation, router weights, predictor scores."""
    figures = [*expert_figures(inspection, f"{slug(arm)}-"), *mod_figures(inspection, f"{slug(arm)}-")]
    # What the evaluation's own figures show already.
    return [Captioned(of.shape, f"{arm}: {of.caption}") for of in figures if of.name not in ("load", "passes")]
