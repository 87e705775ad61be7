"""Routing statistics of a trained run on any text: what `sparsemix inspect` measures."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from sparsemix.config import ConfigError, parse
from sparsemix.data import Batch, Tally, read_documents
from sparsemix.data.detokenizer import Detokenizer
from sparsemix.data.tokenizer import encode_stream
from sparsemix.data.windows import Stream
from sparsemix.evaluate.correlation import correlations
from sparsemix.evaluate.perplexity import Losses, document_losses
from sparsemix.evaluate.routing import expert_details, predictor_report, taken_report
from sparsemix.inputs import read_mapping, trusted
from sparsemix.layers import LayerConfig
from sparsemix.run import Run
from sparsemix.settings import RunConfig
from sparsemix.trained import find_shards, load_run, run_tokenizer

Progress = Callable[[str, int, int | None], None]
HISTOGRAM_BINS = 20
MAP_TOKENS = 128
# What `sparsemix inspect` measures on unless told otherwise.
TOKENS = 65_536


class On(NamedTuple):
    """What is measured on: the first `tokens` tokens of `text`, or of the run's own test split if there is none. data:
    the run's prepared text, where it is not beside the run; text_as: suffixes of further files that are text."""

    text: Sequence[str] = ()
    tokens: int = TOKENS
    data: Path | None = None
    text_as: Sequence[str] = ()


def inspect_folder(folder: Path, on: On, progress: Progress) -> dict[str, Any]:
    """Statistics of a run, or of the first seed of every kind of a comparison. Raises ConfigError."""
    runs = [inspect_run(run, on, progress) for run in run_folders(folder)]
    return {"folder": folder.resolve().name, "runs": runs}


def run_folders(folder: Path) -> list[Path]:
    """The folder itself if a run wrote it, or each kind's first seed if a comparison did. Raises ConfigError."""
    if not (folder / "plan.yaml").is_file():
        return [folder]
    result = folder / "result.json"
    if not result.is_file():
        raise ConfigError(f"{folder} holds an unfinished comparison; finish it, or name one of its runs' folders")
    with trusted(result):
        rows = read_mapping(result, "the same `sparsemix compare` writes it anew")["rows"]
        return [
            folder / min(row["runs"], key=lambda run: (run.get("diverged") is not None, run["seed"]))["folder"]
            for row in rows
        ]


def inspect_run(folder: Path, on: On, progress: Progress) -> dict[str, Any]:
    """Statistics of one run. Raises ConfigError."""
    config = parse(RunConfig, Run(folder).settings)
    seq_len = config.model.seq_len
    if on.tokens < seq_len:
        raise ConfigError(f"tokens={on.tokens} must be at least the run's model.seq_len={seq_len}")
    model = load_run(folder, config)
    tally = Tally()
    stream = read_stream(folder, config, on, tally)
    total = int(stream.starts[-1])
    tokenizer = run_tokenizer(folder, config, on.data)
    if total < seq_len:
        where = ", ".join(on.text) or "the test split"
        raise ConfigError(f"text={where} holds {total} tokens, less than one window of {seq_len}; add text")
    # The logits are the largest tensor: at most 2^25 of them at a time.
    rows = max(1, min(4096, 2**25 // config.model.vocab_size) // seq_len)
    name = folder.resolve().name
    batches = _told(stream.eval_batches(rows, seq_len), f"measuring {name}", -(-total // seq_len), progress)
    losses = document_losses(model, batches, per_token=True)
    series = losses.series()
    found = {
        "run": name,
        "kinds": sorted({kind for path in _routed_paths(losses) for kind in _kinds(config, path)}),
        "text": list(on.text) or ["the run's test split"],
        "read": tally.line() if on.text else "read: the run's test split; skipped: nothing",
        "tokens": losses.tokens,
        "documents": len(losses.nats),
        "nats_per_token": losses.total / losses.tokens if np.isfinite(losses.total) else None,
        "experts": expert_layers(config, losses, series),
        "mod": mod_layers(config, losses, series),
        "passes": None if losses.passes is None else losses.passes.tolist(),
        "map": taken_map(config, series, _texts(tokenizer, stream.tokens[:MAP_TOKENS])),
        "loss_by_depth": loss_by_depth(series),
        "correlation": {
            stat: {to: correlations(value, series[of], series["doc"]) for to, of in TARGETS.items()}
            for stat, value in series.items()
            if stat not in ("doc", *TARGETS.values())
        },
    }
    return {**found, "warnings": _warnings(found)}


TARGETS = {"loss": "nats", "entropy": "entropy"}


def read_stream(folder: Path, config: RunConfig, on: On, tally: Tally) -> Stream:
    """The tokens to measure on, by the run's tokenizer; the tally gets what was read of a text. Raises ConfigError."""
    shards = find_shards(folder, config, on.data)
    if not on.text:
        if shards is None:
            raise ConfigError(f"the prepared data of {folder} is not beside it; give --text, or --data with its folder")
        return Stream(shards.tokens("test"), shards.starts("test")).first(on.tokens)
    tokenizer = run_tokenizer(folder, config, on.data)
    if tokenizer is None:
        raise ConfigError(f"the tokenizer of {folder} is not beside it; give --data with the run's prepared data")
    documents = (document.text for document in read_documents(on.text, text_as=on.text_as, tally=tally))
    return Stream(*encode_stream(tokenizer, documents, on.tokens)).first(on.tokens)


def _told(batches: Iterable[Batch], stage: str, windows: int, progress: Progress) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        progress(stage, done, windows)
        yield batch
        done += len(batch.tokens)
    progress(stage, windows, windows)


def _routed_paths(losses: Losses) -> list[str]:
    names = ("counts", "routed", "confusion", "taken")
    known = [*losses.stats, *losses.rows_per_token]
    return sorted({name.rpartition(".")[0] for name in known if name.rpartition(".")[2] in names})


def _kinds(config: RunConfig, path: str) -> list[str]:
    """The kinds along a layer's path, outermost first, plain blocks left out."""
    along: list[Any] = [config.model]
    for name in path.split("."):
        along.append(along[-1][int(name)] if name.isdigit() else getattr(along[-1], name, None))
    kinds = [getattr(at, "kind", "block") for at in along if isinstance(at, LayerConfig)]
    return [kind for kind in kinds if kind != "block"]


def expert_layers(config: RunConfig, losses: Losses, series: dict[str, np.ndarray]) -> dict[str, Any]:
    """Expert statistics by layer path, of the tokens that reached the layer."""
    layers: dict[str, Any] = {}
    for path in _routed_paths(losses):
        layer: dict[str, Any] = {"kind": " / ".join(_kinds(config, path))}
        if f"{path}.counts" in losses.stats:
            top = series.get(f"{path}.top_gate")
            tokens = losses.tokens if top is None else int((~np.isnan(top)).sum())
            rows = tokens * losses.rows_per_token.get(f"{path}.top_gate", 1)
            summed = [losses.stats[f"{path}.{name}"] for name in ("counts", "gate_mass", "gate_histogram")]
            layer |= expert_details(*summed, tokens, rows)
        if f"{path}.taken" in losses.stats:
            layer["taken"] = taken_report(losses.stats[f"{path}.taken"])
        if len(layer) > 1:
            layers[path] = layer
    return layers


def mod_layers(config: RunConfig, losses: Losses, series: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mixture-of-Depths by layer path: share routed, sigmoid of the router's scores, predictor."""
    layers: dict[str, Any] = {}
    for name in sorted(name for name in series if name.endswith(".routed")):
        path = name.removesuffix(".routed")
        routed = series[name][~np.isnan(series[name])]
        layer: dict[str, Any] = {
            "kind": " / ".join(_kinds(config, path)),
            "tokens": len(routed),
            "routed_rate": float(routed.mean()) if len(routed) else None,
        }
        if f"{path}.scores" in series:
            scores = series[f"{path}.scores"].astype(np.float64)
            weights = 1 / (1 + np.exp(-np.clip(scores[~np.isnan(scores)], -500, 500)))
            layer["weights"] = np.histogram(weights, HISTOGRAM_BINS, (0, 1))[0].tolist()
            layer["above_half"] = float((weights > 0.5).mean()) if len(weights) else None
        if f"{path}.guess" in series:
            layer["guess"] = _histogram(series[f"{path}.guess"])
        if f"{path}.confusion" in losses.stats:
            layer["predictor"] = predictor_report(losses.stats[f"{path}.confusion"])
        layers[path] = layer
    return layers


def taken_map(config: RunConfig, series: dict[str, np.ndarray], texts: Sequence[str]) -> dict[str, Any] | None:
    """Which blocks processed each of the first MAP_TOKENS tokens, by block from the first: 1 or 0; and what these
    tokens say, as given. None if no block is routed."""
    routed = [series.get(f"blocks.{i}.routed") for i in range(len(config.model.blocks))]
    if all(block is None for block in routed):
        return None
    length = len(series["doc"][:MAP_TOKENS])
    blocks = [[1] * length if at is None else (at[:MAP_TOKENS] == 1).astype(int).tolist() for at in routed]
    return {"blocks": blocks, "texts": list(texts[:length])}


def _texts(tokenizer: Tokenizer | None, tokens: np.ndarray) -> list[str]:
    """What each token adds to the text; empty without a tokenizer."""
    if tokenizer is None:
        return []
    text = Detokenizer(tokenizer)
    return [text.add(int(token)) for token in tokens]


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Counts between edges that hold the middle 99 % of the values; the others are in the end bins."""
    values = values[~np.isnan(values)]
    low, high = (float(v) for v in np.percentile(values, [0.5, 99.5])) if len(values) else (0.0, 0.0)
    edges = np.linspace(low, high if high > low else low + 1, HISTOGRAM_BINS + 1)
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def loss_by_depth(series: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Mean loss of the tokens that 0, 1, 2, ... Mixture-of-Depths layers processed."""
    if "depth" not in series:
        return []
    depth, nats = series["depth"], series["nats"].astype(np.float64)
    return [
        {"depth": int(d), "tokens": int((depth == d).sum()), "nats": float(nats[depth == d].mean())}
        for d in np.unique(depth)
    ]


def _warnings(found: dict[str, Any]) -> list[str]:
    said = []
    if not found["experts"] and not found["mod"]:
        said.append("no routed layer: there are no routing statistics of this run")
    for path, layer in found["experts"].items():
        if layer.get("lower_bound"):
            visits, experts = layer["visits_per_expert"], layer["num_experts"]
            said.append(
                f"{path}: usage is a lower bound: {visits:.2g} visits per expert ({layer['tokens']} tokens x "
                f"{layer['picks_per_token']:.3g} picks / {experts} experts); use at least "
                f"{int(np.ceil(10 * experts / max(1e-9, layer['picks_per_token'])))} tokens"
            )
    return said
