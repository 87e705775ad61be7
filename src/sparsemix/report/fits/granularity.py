"""The law of fine-grained experts (arXiv:2402.07871): L = c + (g / G^gamma + a) / N^alpha + b / D^beta.

G, granularity: how many times narrower an expert is than the feed-forward part that a token passes. With experts of
equal width and active width equal to the dense layer's, as in that paper (d_ff / d_expert) and in our sizing, this is
the number of experts that a token picks: top_k of `moe`, num_heads * top_k of `peer`, whose experts are one neuron wide
(arXiv:2407.04153, 2.1: active over expert parameters). N: parameters without embeddings, D: training tokens."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsemix.report.fits.bootstrap import percentiles, resampled
from sparsemix.report.fits.varpro import Projection
from sparsemix.report.records import Record

NAMES = ("c", "g", "a", "b", "gamma", "alpha", "beta")
EXPONENTS = np.geomspace(0.05, 1.5, 18)
# Seven parameters, and a scale of G on which two points would be joined by any curve.
FEWEST_RUNS, FEWEST_SIZES, FEWEST_GRANULARITIES = 10, 3, 3
MOST_RESAMPLES = 300


class Grains(NamedTuple):
    """What a run's expert layers are: `moe` or `peer`, G, and the expansion rate, experts over experts picked."""

    kind: str
    granularity: int
    expansion: float


def grains_of(record: Record) -> Grains | None:
    """None without such layers, or where they differ."""
    found = set()
    for layer in _layers(record.settings["model"]["blocks"]):
        if (kind := layer.get("kind")) in ("moe", "peer"):
            picked = int(layer["top_k"]) if kind == "moe" else layer.get("num_heads", 8) * layer.get("top_k", 16)
            found.add(Grains(kind, picked, layer["num_experts"] / picked))
    return found.pop() if len(found) == 1 else None


def without_embeddings(record: Record) -> int:
    """Parameters less the token embeddings, and less the head where it is another matrix."""
    model = record.settings["model"]
    matrices = 1 if model.get("tie_embeddings", True) else 2
    return record.params - matrices * model["vocab_size"] * model["d_model"]


def granularity_laws(records: Sequence[Record], resamples: int) -> list[dict[str, Any]]:
    """An entry for each kind of expert layer whose runs have granularities and sizes enough to tell seven parameters;
    arms of a kind are fitted together, `arm` is the kind."""
    groups: dict[str, list[tuple[Record, Grains]]] = {}
    for record in records:
        if (found := grains_of(record)) is not None and without_embeddings(record) > 0:
            groups.setdefault(found.kind, []).append((record, found))
    fitted = (_fit(kind, runs, resamples) for kind, runs in groups.items())
    return [entry for entry in fitted if entry is not None]


def granularity_warnings(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Of the entries whose runs differ in what the law holds fixed, or do not tell its parameters."""
    edges = [
        f"{entry['arm']}: these runs do not tell the law of granularity's parameters: a term or an exponent is at its "
        "limit"
        for entry in entries
        if any(not EXPONENTS[1] < entry[name] < EXPONENTS[-2] for name in ("gamma", "alpha", "beta"))
        or min(entry[name] for name in ("c", "g", "a", "b")) <= 0
    ]
    return edges + [
        f"{entry['arm']}: the law of granularity holds the expansion rate fixed, and these runs have "
        f"{entry['expansions'][0]:.3g} to {entry['expansions'][-1]:.3g} experts for each that is picked"
        for entry in entries
        if len(entry["expansions"]) > 1
    ]


def _fit(kind: str, runs: Sequence[tuple[Record, Grains]], resamples: int) -> dict[str, Any] | None:
    params = np.array([float(without_embeddings(r)) for r, _ in runs])
    tokens = np.array([float(r.tokens) for r, _ in runs])
    width = np.array([float(g.granularity) for _, g in runs])
    nats = np.array([r.nats for r, _ in runs])
    known = len(set(zip(params, tokens, width, strict=True))), len(set(params)), len(set(width))
    if any(n < fewest for n, fewest in zip(known, (FEWEST_RUNS, FEWEST_SIZES, FEWEST_GRANULARITIES), strict=True)):
        return None
    at = projection(params, tokens, width)
    coefs, exponents = at.fits(nats[None], steps=200)
    if np.isnan(coefs).any():
        return None
    predicted = _loss(coefs[0], exponents[0], params, tokens, width)
    clusters: list[Hashable] = [(r.budget, r.arm, r.params, r.seed) for r, _ in runs]
    leverage = at.leverage(nats, exponents[0])
    again = resampled(predicted, nats - predicted, leverage, clusters, min(resamples, MOST_RESAMPLES))
    draws = np.hstack(at.fits(again))
    found = np.hstack([coefs[0], exponents[0]])
    return {
        "arm": kind,
        **dict(zip(NAMES, map(float, found), strict=True)),
        "ci": {name: percentiles(draws[:, i]) for i, name in enumerate(NAMES)},
        "rmse": float(np.sqrt(np.mean((nats - predicted) ** 2))),
        "num_runs": len(runs),
        "granularities": sorted({int(g) for g in width}),
        "expansions": sorted({grains.expansion for _, grains in runs}),
        "arms": list(dict.fromkeys(r.arm for r, _ in runs)),
    }


def projection(params: np.ndarray, tokens: np.ndarray, width: np.ndarray) -> Projection:
    """Of the terms c, g / (G^gamma N^alpha), a / N^alpha and b / D^beta, exponents gamma, alpha, beta."""
    n, d, g = np.log(params), np.log(tokens), np.log(width)
    none = np.zeros_like(n)
    return Projection(np.array([[none, none, none], [g, n, none], [none, n, none], [none, none, d]]), EXPONENTS)


def _loss(
    coefs: np.ndarray, exponents: np.ndarray, params: np.ndarray, tokens: np.ndarray, width: np.ndarray
) -> np.ndarray:
    (c, g, a, b), (gamma, alpha, beta) = coefs, exponents
    return c + (g / width**gamma + a) / params**alpha + b / tokens**beta


def _layers(node: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary with a kind below a node of the settings."""
    if isinstance(node, list):
        for part in node:
            yield from _layers(part)
    elif isinstance(node, dict):
        if "kind" in node:
            yield node
        for part in node.values():
            yield from _layers(part)
