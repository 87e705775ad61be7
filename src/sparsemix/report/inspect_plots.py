"""The figures of `sparsemix inspect`: load, gates, activation, routed share, predictor scores, tokens taken."""

from typing import Any, NamedTuple

from sparsemix.report.figures import Bars, Chart, HeatMap, Line, legend
from sparsemix.report.numbers import Markup, si
from sparsemix.report.plots import figure, load_caption, load_chart

UNIT = tuple(i / 20 for i in range(21))
BLUE, ORANGE, GREEN = 1, 2, 3


class Drawn(NamedTuple):
    """A figure with its caption; `name` is unique within its run."""

    name: str
    shape: Chart | Bars | HeatMap
    caption: str

    def html(self) -> Markup:
        """The figure as HTML."""
        key = legend(self.shape.lines) if isinstance(self.shape, Chart) else ""
        return figure(self.shape.svg(), self.caption, key)


def expert_figures(run: dict[str, Any], prefix: str) -> list[Drawn]:
    """Load, activation, gates and tokens taken of the layers with experts."""
    experts = {path: layer for path, layer in run["experts"].items() if "by_count" in layer}
    drawn = []
    if (load := load_chart(experts, f"{prefix}load", run["run"], BLUE)) is not None:
        drawn.append(Drawn("load", load, load_caption(load)))
    if experts:
        drawn.append(_activation(experts, prefix))
    for i, (path, layer) in enumerate(experts.items()):
        shape = Bars(
            f"{prefix}gates-{i}", f"{path}: gates", "gate", layer["gate_histogram"], BLUE, (), UNIT, "picks (%)"
        )
        drawn.append(Drawn(f"gates-{i}", shape, f"{path}: gates of all picks; those outside [0, 1] in the end bars."))
    for i, (path, layer) in enumerate(run["experts"].items()):
        if "taken" in layer:
            most = max((n for n, tokens in enumerate(layer["taken"]["histogram"]) if tokens), default=0)
            values = layer["taken"]["histogram"][: most + 1]
            shape = Bars(f"{prefix}taken-{i}", f"{path}: tokens taken", "experts that took the token", values, GREEN)
            drawn.append(Drawn(f"taken-{i}", shape, f"{path}: tokens by the number of experts that took them."))
    return drawn


def _activation(experts: dict[str, Any], prefix: str) -> Drawn:
    lines: list[Line] = []
    for path, layer in experts.items():
        curve = layer["activation"]
        several = layer["rows"] != layer["tokens"]
        for key, name in (("per_token", f"{path}, per token"), ("per_row", f"{path}, per sub-token")):
            if several or key == "per_token":
                points = [(t, 100 * y) for t, y in zip(curve["thresholds"], curve[key], strict=True)]
                lines.append(Line(name if several else path, len(lines), points, colour=BLUE + len(lines)))
    ticks = [10.0**power for power in range(-5, 1)]
    chart = Chart(
        f"{prefix}activation", "Active experts over the threshold", "picks per token above which an expert is active",
        "active experts (%)", lines, log_x=True, y_zero=True, x_ticks=ticks,
    )  # fmt: skip
    several = any(layer["rows"] != layer["tokens"] for layer in experts.values())
    caption = "Share of experts whose picks, divided by the tokens, exceed the threshold." + (
        " Per sub-token: divided by the rows that the experts saw, which removes the factor of the heads."
        if several
        else ""
    )
    return Drawn("activation", chart, caption)


def mod_figures(run: dict[str, Any], prefix: str) -> list[Drawn]:
    """Routed share, router weights, predictor scores and passes of the Mixture-of-Depths layers."""
    layers, drawn = run["mod"], []
    rates = {path.removeprefix("blocks."): layer["routed_rate"] for path, layer in layers.items()}
    rates = {path: rate for path, rate in rates.items() if rate is not None}
    if rates:
        shape = Bars(
            f"{prefix}routed", "Tokens routed by layer", "block", list(rates.values()), ORANGE, list(rates), total=1.0
        )
        drawn.append(Drawn("routed", shape, "Share of the tokens that each Mixture-of-Depths layer processed."))
    if run["passes"]:
        shape = Bars(f"{prefix}passes", "Tokens by depth", "layers that processed the token", run["passes"], ORANGE)
        text = f"How many of {len(run['passes']) - 1} layers processed a token ({si(sum(run['passes']))} tokens)."
        drawn.append(Drawn("passes", shape, text))
    if found := run.get("map"):
        shape = taken_map(found, f"{prefix}map", "Tokens that each block took")
        text = f"The first {len(found['blocks'][0])} tokens of the text; filled where the block processed the token."
        drawn.append(Drawn("map", shape, text))
    for i, (path, layer) in enumerate(layers.items()):
        if "weights" in layer:
            shape = Bars(
                f"{prefix}weights-{i}", f"{path}: router weights", "sigmoid of the router's score", layer["weights"],
                ORANGE, (), UNIT,
            )  # fmt: skip
            text = f"{path}: sigmoid of the router's scores of all tokens, routed or not."
            drawn.append(Drawn(f"weights-{i}", shape, text))
        if "guess" in layer:
            shape = Bars(
                f"{prefix}guess-{i}", f"{path}: predictor scores", "predictor's logit", layer["guess"]["counts"],
                ORANGE, (), layer["guess"]["edges"],
            )  # fmt: skip
            text = f"{path}: the predictor's logits; a token above 0 is routed. The end bars hold what lies beyond."
            drawn.append(Drawn(f"guess-{i}", shape, text))
    return drawn


def taken_map(found: dict[str, Any], id: str, title: str) -> HeatMap:
    """Which blocks processed each token, as an inspection's `map` has it."""
    blocks, texts = found["blocks"], found["texts"]
    spans = [f"token {i}{f' ({text!r})' if text else ''}" for i, text in enumerate(texts)]
    edges = range(len(blocks[0]) + 1)
    names = [f"block {i}" for i in range(len(blocks))]
    return HeatMap(id, title, "position in the text", "block", names, edges, blocks, spans=spans)
