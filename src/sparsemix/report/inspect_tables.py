"""The tables of `sparsemix inspect`, once as data, for the page and for a terminal."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsemix.report.numbers import DASH, Markup, fixed, interval, percent, si
from sparsemix.report.tables import table

Run = dict[str, Any]


class Spec(NamedTuple):
    """A table: its columns numbered in `text` are aligned left."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    text: tuple[int, ...] = (0,)

    def html(self) -> Markup:
        """As HTML."""
        return table(self.caption, self.columns, self.rows, text=self.text)

    def rich(self) -> Table:
        """For a terminal."""
        drawn = Table(title=self.caption, title_justify="left")
        for i, name in enumerate(self.columns):
            drawn.add_column(name, justify="left" if i in self.text or i == 0 else "right")
        for row in self.rows:
            drawn.add_row(*row)
        return drawn


def use(run: Run) -> Spec:
    """How many experts the tokens reached."""
    rows = [
        [
            path, layer["kind"], si(layer["num_experts"]), si(layer["tokens"]), f"{layer['picks_per_token']:.4g}",
            si(layer["visits_per_expert"]), f"{'≥ ' if layer['lower_bound'] else ''}{percent(layer['usage'])}",
            percent(layer["picked"]),
        ]
        for path, layer in _counted(run)
    ]  # fmt: skip
    columns = ["layer", "kind", "experts", "tokens", "picks a token", "visits an expert", "usage", "picked"]
    return Spec(
        "Use of the experts: usage is the share with any gate mass, picked that with any pick", columns, rows, (0, 1)
    )


def evenness(run: Run) -> Spec:
    """Unevenness and its relatives, by picks and by gate mass."""
    rows = []
    for path, layer in _counted(run):
        for weighting, of in (("picks", layer["by_count"]), ("gates", layer["by_gate"])):
            cover = " / ".join(str(n) for n in of["cover"].values()) if of["cover"] else DASH
            numbers = [
                fixed(of[name], decimals)
                for name, decimals in (
                    ("unevenness", 3), ("effective", 1), ("entropy", 3), ("normalised_entropy", 3),
                    ("max_over_mean", 2), ("gini", 3),
                )
            ]  # fmt: skip
            rows.append([path, weighting, *numbers, cover])
    columns = [
        "layer", "weighted by", "unevenness (nats)", "effective experts", "entropy (nats)", "of ln E", "max / mean",
        "Gini", "hold 50/90/99 %",
    ]  # fmt: skip
    return Spec("Evenness of the experts", columns, rows, (0, 1))


def activation(run: Run) -> Spec:
    """Share of experts above stated thresholds."""
    rows = []
    for path, layer in _counted(run):
        stated = layer["activation"]["stated"]
        rows.append([path, "token", *(percent(value[0]) for value in stated.values())])
        if layer["rows"] != layer["tokens"]:
            rows.append([path, "sub-token", *(percent(value[1]) for value in stated.values())])
    thresholds = list(dict.fromkeys(t for _, layer in _counted(run) for t in layer["activation"]["stated"]))
    columns = ["layer", "picks per", *(f">\u00a0{threshold}" for threshold in thresholds)]
    return Spec("Share of the experts that is active above a threshold of picks", columns, rows, (0, 1))


def taken(run: Run) -> Spec:
    """Tokens by the number of experts that took them."""
    rows = [
        [
            path,
            layer["kind"],
            *(percent(layer["taken"][name]) for name in ("none", "one", "several")),
            fixed(layer["taken"]["mean"], 3),
        ]
        for path, layer in run["experts"].items()
        if "taken" in layer
    ]
    columns = ["layer", "kind", "by none", "by one", "by several", "experts a token"]
    return Spec("Tokens by how many experts took them", columns, rows, (0, 1))


def depths(run: Run) -> Spec:
    """What each Mixture-of-Depths layer let through, and how well its predictor knew."""
    rows = []
    for path, layer in run["mod"].items():
        known = layer.get("predictor") or {}
        rates = [layer["routed_rate"], known.get("capacity"), layer.get("above_half")]
        scores = [known.get(name) for name in ("accuracy", "always_skip", "precision", "recall", "f1")]
        rows.append([path, si(layer["tokens"]), *(percent(value) for value in [*rates, *scores])])
    columns = [
        "layer", "tokens", "routed", "top-k", "weight > 0.5", "accuracy", "always skip", "precision", "recall", "F1",
    ]  # fmt: skip
    return Spec("Mixture-of-Depths: routed share, router weights, predictor against the top-k", columns, rows)


def losses_by_depth(run: Run) -> Spec:
    """Mean loss by the number of Mixture-of-Depths layers that processed the token."""
    total = max(1, sum(at["tokens"] for at in run["loss_by_depth"]))
    rows = [
        [str(at["depth"]), si(at["tokens"]), percent(at["tokens"] / total), fixed(at["nats"], 4)]
        for at in run["loss_by_depth"]
    ]
    columns = ["layers", "tokens", "share", "loss (nats)"]
    return Spec("Mixture-of-Depths: tokens by how many layers processed them", columns, rows)


def correlations(run: Run) -> Spec:
    """Correlation of each routing statistic with loss and entropy."""
    rows = []
    for name, targets in run["correlation"].items():
        for target, of in targets.items():
            numbers = [
                text
                for kind in ("pearson", "spearman")
                for text in (fixed(of[kind], 3, signed=True), interval(of[f"{kind}_ci"], 3, signed=True))
            ]
            rows.append([name, target, si(of["tokens"]), si(of["documents"]), *numbers])
    columns = ["statistic", "with", "tokens", "documents", "Pearson", "95 % interval", "Spearman", "95 % interval"]
    return Spec("Correlation over tokens with their loss, and with the prediction's entropy", columns, rows, (0, 1))


EXPERTS: tuple[Callable[[Run], Spec], ...] = (use, evenness, activation, taken)
DEPTHS: tuple[Callable[[Run], Spec], ...] = (depths, losses_by_depth)


def _counted(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((path, layer) for path, layer in run["experts"].items() if "by_count" in layer)


def console_tables(result: dict[str, Any]) -> Group:
    """Every run's tables for a terminal, the empty ones left out."""
    parts: list[RenderableType] = []
    for run in result["runs"]:
        measured = f"{si(run['tokens'])} tokens in {si(run['documents'])} documents of {', '.join(run['text'])}"
        parts.append(Text(f"{run['run']}: {fixed(run['nats_per_token'], 4)} nats a token on {measured}", style="bold"))
        specs = [make(run) for make in (*EXPERTS, *DEPTHS, correlations)]
        parts += [spec.rich() for spec in specs if spec.rows]
        parts += [Text(warning, style="yellow") for warning in run["warnings"]]
    return Group(*parts)
