"""The card of an exported model: what it is, how it was trained, what was measured, and what it cannot do."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from scipy.stats import t

from sparsemix import __version__
from sparsemix.config import config_hash, to_yaml
from sparsemix.evaluate.estimate import effective, ratio, units
from sparsemix.inputs import read_mapping, trusted
from sparsemix.interop.causal_rules import causal_rules
from sparsemix.layers import LayerConfig
from sparsemix.model import LM, ModelConfig
from sparsemix.run import CONVENTION, by_document
from sparsemix.settings import RunConfig

Rows = Sequence[tuple[str, object]]
UNKNOWN = "not recorded: the model was exported from a model's folder; export the run's folder to have it here"
LOADING = {
    True: """```python
import sparsemix  # pip install sparsemix; or trust_remote_code=True below, which needs the package too
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer(["Once upon a time"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40))[0])
```""",
    False: """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")  # transformers' own class
tokenizer = AutoTokenizer.from_pretrained("{name}")
```""",
}


def model_card(
    model: LM, layout: str, name: str, source: Path, config: RunConfig | None, result: dict[str, Any] | None
) -> ModelCard:
    """Filled from the run's settings, its result, its losses per document (documents.npz) and, where there is one, its
    evaluation on other corpora (eval.json)."""
    test = bits_per_byte(source / "documents.npz") if result is not None else None
    kinds = list(dict.fromkeys(layer.kind for layer, _ in layers_of(model.config) if layer.kind not in PLAIN))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparsemix", *kinds],
        datasets=hub_datasets(config),
        model_name=name,
        eval_results=eval_results(result, test, source),
    )
    sections = {
        "How to load it": LOADING[layout == "sparsemix"].format(name=name),
        "Model": about_model(model.config),
        "Routing": "\n".join(f"- {line}" for line in causal_rules(model.config)),
        "Training": UNKNOWN if config is None else about_training(config, result),
        "Evaluation": about_evaluation(result, test, source),
        "Limits": "\n".join(f"- {line}" for line in limits(model.config, layout, config)),
        "Settings": f"```yaml\n{to_yaml(model.config)}```",
    }
    head = f"# {name}\n\nA decoder-only language model, trained and exported with sparsemix {__version__}."
    text = "\n\n".join([head, *(f"## {title}\n\n{body}" for title, body in sections.items())])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


# Kinds that route nothing.
PLAIN = ("block", "attention", "dense")


def layers_of(config: ModelConfig) -> Iterator[tuple[Any, int]]:
    """Every layer's settings, outer ones first, and the block it is in."""

    def inside(layer: LayerConfig) -> Iterator[LayerConfig]:
        yield layer
        for child in layer.children():
            yield from inside(child)

    for i, block in enumerate(config.blocks):
        yield from ((layer, i) for layer in inside(block))


def table(rows: Rows) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def about_model(config: ModelConfig) -> str:
    cost = config.cost()
    return table(
        [
            ("parameters", f"{cost.params:,}"),
            ("active parameters, one token in expectation", f"{cost.active_params:,.0f}"),
            ("blocks", len(config.blocks)),
            ("width", config.d_model),
            ("context in training", f"{config.seq_len} tokens"),
            ("vocabulary", config.vocab_size),
            ("forward FLOPs a token", f"{cost.flops / config.seq_len:,.0f}"),
            ("settings' hash", config_hash(config)),
        ]
    )


def about_training(config: RunConfig, result: Mapping[str, Any] | None) -> str:
    train, data = config.train, config.data
    rows: list[tuple[str, object]] = [
        ("text", ", ".join(told_source(source) for source in data.text)),
        ("fingerprint of the text", data.fingerprint or "not recorded"),
        ("tokenizer", (data.tokenizer and told_source(data.tokenizer)) or "byte-level BPE trained on the text"),
        ("seed", config.seed),
        ("learning rate", f"{train.lr:g}, {train.schedule}, warm-up {train.warmup:g} of the steps"),
        (
            "optimizer",
            f"{train.optimizer}, weight decay {train.weight_decay:g}, gradients clipped at {train.clip_norm:g}",
        ),
        ("tokens a step", f"{config.batch_size * config.model.seq_len:,}"),
    ]
    if result is not None:
        rows += [
            ("steps", f"{result['steps']:,}"),
            ("tokens", f"{result['tokens']:,}"),
            ("training FLOPs", f"{result['flops']:.4g}"),
            ("numbers", f"{result['dtype']}, {'compiled' if result['compiled'] else 'not compiled'}"),
            ("time", f"{result['wall_s']:,.0f} s on {result['hardware']}"),
            ("versions", ", ".join(f"{package} {version}" for package, version in result["versions"].items())),
            ("kernels", json.dumps(result["kernels"])),
        ]
    return f"{table(rows)}\n\nThe convention of FLOPs: {CONVENTION}"


def told_source(source: str) -> str:
    """A source's name, without folders of the machine it lay on."""
    return source if source.startswith("hf:") else Path(source).name


def hub_datasets(config: RunConfig | None) -> list[str] | None:
    sources = [] if config is None else config.data.text
    return [source.split(":")[1] for source in sources if source.startswith("hf:")] or None


class Test(NamedTuple):
    """Bits per byte, the standard error over documents, half a 95 % interval, and the number of documents (of their
    parts where documents are too few to say anything of others)."""

    value: float
    error: float
    half: float
    documents: int
    by_part: bool


def bits_per_byte(path: Path) -> Test | None:
    """Of a run's losses per document; None without the file.

    t has the degrees of freedom of the number of equally long documents that would weigh the same. One document alone
    says nothing of its error: it is infinite."""
    if not path.is_file():
        return None
    held = by_document(path)
    losses = units(held["nats"][None], held["bytes"], held.get("groups"))
    bits, num_bytes = losses.nats[0] / np.log(2), losses.bytes.astype(float)
    found = ratio(bits, num_bytes)
    error = float("inf") if found.error is None else found.error
    degrees = max(1.0, effective(num_bytes) - 1)
    return Test(found.value, error, float(t.ppf(0.975, degrees)) * error, len(bits), losses.by_part)


def about_evaluation(result: Mapping[str, Any] | None, test: Test | None, source: Path) -> str:
    if result is None:
        return UNKNOWN
    lines = []
    if test is not None:
        low, high = test.value - test.half, test.value + test.half
        scored = "parts of documents" if test.by_part else "documents"
        choice = "more text of the same documents" if test.by_part else "the choice of documents"
        lines.append(
            f"Held-out documents of the training text, causal routing: **{test.value:.4f} bits per byte**, standard "
            f"error {test.error:.4f}, 95 % interval [{low:.4f}, {high:.4f}] over {test.documents} {scored}; "
            f"perplexity a token {result['perplexity']:.3f} on {result['test_tokens']:,} tokens. The interval covers "
            f"{choice}, not that of the seed: this is one run."
        )
    if (ahead := result.get("lookahead_bpb")) is not None:
        lines.append(
            f"With training's look-ahead routing the same documents give {ahead:.4f} bits per byte, "
            f"{ahead - result['bpb']:+.4f}: what a model gains that may look at later tokens. It is no result."
        )
    for path, found in result["routing"]["predictor"].items():
        lines.append(f"`{path}` processed {found['routed_rate']:.1%} of the tokens (capacity {found['capacity']:.1%}).")
    spent = result.get("eval_flops_per_token")
    if isinstance(spent, (int, float)):
        lines.append(f"Forward FLOPs really spent a token in evaluation: {spent:,.0f}.")
    if rows := corpora(source):
        told = ["| corpus | bits per byte | perplexity | documents |", "|---|---|---|---|"]
        told += [f"| {r['name']} | {pm(r['bits_per_byte'])} | {pm(r['perplexity'])} | {r['documents']} |" for r in rows]
        lines.append("Other corpora, ± one standard error over documents:\n\n" + "\n".join(told))
    return "\n\n".join(lines)


def pm(estimate: Mapping[str, float | None]) -> str:
    value, error = estimate["value"], estimate["error"]
    return "not finite" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def corpora(source: Path) -> list[dict[str, Any]]:
    """The total of every corpus that `sparsemix eval` measured beside the run."""
    path = source / "eval.json"
    held = read_mapping(path, "delete it, or measure it again") if path.is_file() else {}
    with trusted(path):
        return [corpus["rows"][0] for corpus in held.get("corpora", {}).values() if corpus.get("rows")]


def eval_results(result: Mapping[str, Any] | None, test: Test | None, source: Path) -> list[EvalResult] | None:
    """The same numbers for the hub."""
    measured = [] if test is None else [("held-out documents of the training text", test.value)]
    measured += [(row["name"], row["bits_per_byte"]["value"]) for row in corpora(source)] if result else []
    found = [
        EvalResult(
            task_type="text-generation",
            # The hub takes results of one type for those of one data set.
            dataset_type=name,
            dataset_name=name,
            metric_type="bits_per_byte",
            metric_name="bits per byte, causal",
            metric_value=round(value, 5),
        )
        for name, value in measured
        if value is not None
    ]
    return found or None


def limits(config: ModelConfig, layout: str, run: RunConfig | None) -> list[str]:
    told = [
        f"Trained on sequences of {config.seq_len} tokens; nothing was measured beyond.",
        "A base model: it continues text, was taught to follow no instruction, and repeats what its text holds.",
        "In training every document followed an end-of-text token: begin a prompt with it (`bos_token`) to begin a "
        "document. Padding is that token too unless the tokenizer has its own.",
        "The licence of the weights and of the text is for their owners to state; this card states none.",
    ]
    if config.looks_ahead:
        told.append(
            "In training, routing compares a token with later ones. Generation and evaluation use the causal rule "
            "above, which needs the running state in these weights; a prompt is routed by it as well."
        )
    if layout == "sparsemix":
        told.append(
            "Keys and values lie in a cache of their own (static, offloaded and quantised caches are refused); "
            "attention weights, inputs_embeds and nn.DataParallel are not supported."
        )
    if run is not None and run.train.budget_flops < 1e18:
        told.append(f"A budget of {run.train.budget_flops:.3g} training FLOPs is a small experiment's.")
    return told
