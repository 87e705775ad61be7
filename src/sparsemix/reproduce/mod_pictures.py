"""Which tokens each block of Mixture-of-Depths took, and the weights of its routers: Figure 5 of the paper."""

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sparsemix.durable import write_atomic
from sparsemix.inputs import checked_json, read_mapping
from sparsemix.inspection import On, inspect_run
from sparsemix.report.figures import Bars, HeatMap
from sparsemix.report.inspect_plots import taken_map
from sparsemix.report.numbers import percent
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mod_arms import MOD, router_bce, single
from sparsemix.reproduce.tables import spread
from sparsemix.reproduce.trends import Test, bounded, judge

BCE = router_bce(0.1)
TOKENS = 32_768
UNIT = tuple(i / 20 for i in range(21))
# "About 12.5 %", rounded to whole eighths of what lies around it.
ABOUT = (10.0, 15.0)


def design(scale: Scale) -> Design:
    """MoD with its predictor, and with the router's own cross-entropy, whose weights the figure shows."""
    return single(scale, MOD, BCE)


def outcome(lab: Lab) -> Outcome:
    seen = {arm: [observed(lab, run) for run in runs] for arm, runs in lab.runs.items()}
    main, bce = seen[MOD.name], seen[BCE.name]
    tests = [
        bounded(
            f"about 12.5 % ({ABOUT[0]:g} to {ABOUT[1]:g} %) of router weights are above 0.5 under the cross-entropy",
            [100 * at["above_half"] for at in bce],
            *ABOUT,
            unit=" %",
        ),
        *_together(main),
        bounded(
            "blocks that a token passes correlate with the entropy of its prediction",
            [at["entropy"] for at in main if at["entropy"] is not None],
            0,
            unit=" (Pearson's r)",
        ),
    ]
    figures = [figure for arm, id in ((MOD.name, "predictor"), (BCE.name, "bce")) for figure in _figures(arm, id, seen)]
    return Outcome([_table(seen)], judge(tests), figures, NOTES, {"seen": seen})


def _together(seen: Sequence[dict[str, Any]]) -> list[Test]:
    """Whether blocks choose the same tokens, which takes two that choose."""
    every = "more tokens pass all routed blocks than if blocks chose independently"
    none = "more tokens pass none of them than if blocks chose independently"
    if len(seen[0]["routed"]) < 2:
        return [Test(words, False, None, "these models have one routed block") for words in (every, none)]
    together = [100 * (_share(at, -1) - prod(at["routed"].values())) for at in seen]
    past = [100 * (_share(at, 0) - prod(1 - rate for rate in at["routed"].values())) for at in seen]
    return [bounded(every, together, 0, unit=" points"), bounded(none, past, 0, unit=" points")]


NOTES = [
    "Maps and depths are of the causal rule, on test text; a map is of its first tokens, of seed 0.",
    "Weights are sigmoids of the router's scores, of all tokens. With a predictor nothing says where a router's scores "
    "must lie, only which are larger; the cross-entropy puts those of the top-k above 0.5.",
]


def observed(lab: Lab, run: Record) -> dict[str, Any]:
    """What a trained model's routing does on test text, kept in the run's folder: histogram of weights and their share
    above 0.5, share routed by layer, tokens by depth, correlation of depth with entropy, and a map of the
    first tokens."""
    path = run.folder / "mod-routing.json"
    if not path.is_file():
        lab.say(f"routing of {run.arm}, seed {run.seed}")
        write_atomic(path, checked_json(_observe(lab.data, run)))
    return read_mapping(path, "delete it to have it measured again")


def _observe(data: Path, run: Record) -> dict[str, Any]:
    seq_len = run.settings["model"]["seq_len"]
    found = inspect_run(run.folder, On(tokens=max(TOKENS, seq_len), data=data), lambda *_: None)
    layers = found["mod"]
    correlation = found["correlation"].get("depth", {}).get("entropy", {}).get("pearson")
    return {
        "weights": np.sum([layer["weights"] for layer in layers.values()], axis=0).tolist(),
        "above_half": fmean(layer["above_half"] for layer in layers.values()),
        "routed": {path: layer["routed_rate"] for path, layer in layers.items()},
        "passes": found["passes"],
        "entropy": correlation,
        "map": found["map"],
    }


def _share(at: dict[str, Any], depth: int) -> float:
    """Share of the tokens that so many routed blocks processed."""
    return at["passes"][depth] / sum(at["passes"])


def _table(seen: dict[str, list[dict[str, Any]]]) -> TextTable:
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "weights above 0.5 (%)": lambda at: 100 * at["above_half"],
        "tokens routed (%)": lambda at: 100 * fmean(at["routed"].values()),
        "in all routed blocks (%)": lambda at: 100 * _share(at, -1),
        "in none (%)": lambda at: 100 * _share(at, 0),
    }
    rows: list[Sequence[str]] = []
    for arm, found in seen.items():
        entropy = [at["entropy"] for at in found if at["entropy"] is not None]
        rows.append([arm, *(spread([value(at) for at in found], 2) for value in columns.values()), spread(entropy, 3)])
    paper = entry("mod-fig5").numbers
    rows.append(["paper", paper["above_half"], percent(0.125), "some", "some", paper["entropy"]])
    return TextTable("Routing on test text", ("arm", *columns, "depth with entropy (r)"), rows)


def _figures(arm: str, id: str, seen: dict[str, list[dict[str, Any]]]) -> list[HeatMap | Bars]:
    first = seen[arm][0]
    weights = np.sum([at["weights"] for at in seen[arm]], axis=0).tolist()
    return [
        taken_map(first["map"], f"taken-{id}", f"{arm}: tokens that each block took"),
        Bars(
            f"weights-{id}", f"{arm}: router weights", "sigmoid of the router's score", weights, 2, (), UNIT,
            y_label="tokens (%), all layers and seeds",
        ),
    ]  # fmt: skip


REPRODUCTIONS = {"mod-fig5": Reproduction(design, outcome)}
