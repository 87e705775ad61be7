"""From finished runs to result.json: rows with intervals and verdicts, count-model baselines, provenance."""

from datetime import UTC, datetime
from typing import Any

import numpy as np

from sparsemix.data import Shards, read_line
from sparsemix.evaluate.estimate import Units, effective
from sparsemix.evaluate.ngram import ngram_baselines
from sparsemix.layers import BlockConfig
from sparsemix.provenance import hardware, joined, versions
from sparsemix.report.records import document_units
from sparsemix.report.stats import Difference
from sparsemix.run import CONVENTION, Run
from sparsemix.settings import RunConfig
from sparsemix.sweep.arms import split_kind
from sparsemix.sweep.compare import Comparison, settings_text
from sparsemix.sweep.rows import Runs, diverged, divergence_of, rows_of


def summarise(comparison: Comparison, runs: Runs, command: str) -> dict[str, Any]:
    """The content of result.json."""
    settings, shards = comparison.settings, comparison.shards
    lost = {kind: diverged(several) for kind, several in runs.items()}
    losses = {
        kind: document_units(held)
        for kind, several in runs.items()
        if (held := [folder for _, folder in several if folder.name not in lost[kind]])
    }
    tuned = settings.lr == "sweep"
    rows, differences = rows_of(runs, losses, lost, untuned=not tuned)
    dense_config = runs["dense"][0][0]
    baselines, launcher = _baselines(shards, dense_config), comparison.launcher
    corpus = _corpus(shards, dense_config)
    tokens = max((row["tokens"] for row in rows if row["tokens"]), default=0)
    results = [result for several in runs.values() for _, folder in several if (result := Run(folder).result)]
    result = {
        "command": command,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": settings_text(settings),
        "budget_flops": comparison.budget,
        "convention": CONVENTION,
        "scope": _scope(dense_config, comparison.budget, settings.placement),
        "fairness": _fairness({kind: several[0][0] for kind, several in runs.items()}, settings.placement),
        "tuned": tuned,
        "rows": rows,
        "baselines": baselines,
        "lr_sweep": comparison.lr_sweep,
        "corpus": corpus,
        "epochs": tokens / corpus["splits"]["train"]["tokens"],
        "versions": joined(*(result["versions"] for result in results), versions()),
        "kernels": joined(*(result["kernels"] for result in results)),
        "hardware": f"{hardware()}; {launcher.workers} runs at a time, {launcher.threads} thread(s) each",
    }
    result["limits"] = _limits(next(iter(losses.values()), None), differences, settings.seeds, corpus)
    return {**result, "warnings": divergence_of(rows, settings.seeds) + _warnings(result, settings.seeds)}


# Tokens before a target that the longest count model looks at.
CONTEXT = 4


def _limits(losses: Units | None, differences: dict[str, Difference], seeds: int, corpus: dict[str, Any]) -> str:
    """What the intervals rest on, and what would make them narrower; nothing where every run diverged."""
    if losses is None:
        return ""
    scored, held = corpus["evaluated"], corpus["splits"]["test"]
    what = "parts of documents" if losses.by_part else "documents"
    said = (
        f"Intervals rest on {seeds} seed{'s' * (seeds != 1)} and {len(losses.bytes)} {what}, which weigh as much as "
        f"{effective(losses.bytes):.3g} of equal length"
    )
    if losses.by_part:
        number = f"{scored['documents']} document{'s' * (scored['documents'] != 1)}"
        said += (
            f"; they are of {number}, too few or too unequal to speak for others, so that the intervals are about more "
            "text of the same documents"
        )
    few_seeds, few_documents = (
        [kind for kind, d in differences.items() if d.interval.limit == limit] for limit in ("seeds", "documents")
    )
    if few_seeds:
        said += f". More seeds would narrow the differences of {', '.join(few_seeds)} most (--seeds)"
    if few_documents:
        more = "add text, or raise data.test_fraction"
        if scored["tokens"] < held["tokens"] - 1:
            more = f"raise train.test_tokens, the test split has {held['tokens']} tokens"
        said += f". More test text would narrow those of {', '.join(few_documents)} most ({more})"
    return f"{said}."


def _baselines(shards: Shards, config: RunConfig) -> dict[str, float]:
    """Count models trained on the whole training split, on the same test tokens."""
    parts = shards.parts("test", config.model.seq_len, config.train.test_tokens)
    eot = shards.manifest["end_of_text"]
    test, scored = parts.with_context(shards.tokens("test"), CONTEXT, eot)
    train, num_bytes = np.asarray(shards.tokens("train")), int(parts.bytes.sum())
    return ngram_baselines(train, test, num_bytes, config.model.vocab_size, scored, eot)


def _corpus(shards: Shards, config: RunConfig) -> dict[str, Any]:
    manifest = shards.manifest
    parts = shards.parts("test", config.model.seq_len, config.train.test_tokens)
    measures = ("bytes", "documents", "tokens")
    return {
        "sources": manifest["sources"],
        "bytes": manifest["bytes_total"],
        "documents": sum(manifest["documents"].values()),
        "fingerprint": manifest["fingerprint"],
        "duplicates_dropped": manifest["duplicates_dropped"],
        "contamination": manifest.get("contamination"),
        "split": manifest["settings"].get("split", "hash"),
        "warnings": manifest.get("warnings", []),
        "read": read_line(manifest),
        "vocab_size": manifest["vocab_size"],
        "tokenizer": manifest["tokenizer"],
        "splits": {s: {m: manifest[m][s] for m in measures} for s in ("train", "validation", "test")},
        "evaluated": {
            "documents": len(np.unique(parts.docs)),
            "bytes": int(parts.bytes.sum()),
            "tokens": parts.tokens,
        },
    }


def _scope(config: RunConfig, budget: float, placement: str) -> str:
    cost = config.model.cost()
    return (
        f"The verdict is about this size only: a dense backbone of {cost.params / 1e6:.2f} M parameters (width "
        f"{config.model.d_model}, {len(config.model.blocks)} blocks, sequences of {config.model.seq_len}), "
        f"{budget:.3g} training FLOPs a run, placement of routed feed-forwards: {placement}, MoD around every other "
        "block. Other sizes and budgets may order the kinds differently."
    )


SCHEDULES = {
    "cosine": "cosine to a tenth of the rate at the end of the budget",
    "two_stage": "a straight line to a tenth, times 2/3 and without weight decay from half of the budget on",
}
TERNARY = (
    "KIND@ternary: every matrix of attention, feed-forwards and experts is BitNet b1.58 (weights -1, 0, 1 times one "
    "scale, int8 rows, RMSNorm before the last matrix); embeddings, norms, routers, tables and logits are not. Its "
    "FLOPs are counted as if they were of floats, and its bytes per token as one a weight."
)


def _fairness(configs: dict[str, RunConfig], placement: str) -> list[str]:
    """What the kinds share, and how each feed-forward was sized."""
    dense = configs["dense"]
    model, train = dense.model, dense.train
    said = [
        f"Backbone: {len(model.blocks)} blocks of width {model.d_model}, the first "
        f"{_words(model.blocks[0].model_dump())}; vocabulary {model.vocab_size}, "
        f"sequences of {model.seq_len} tokens, {'tied' if model.tie_embeddings else 'untied'} embeddings.",
        f"Training: {dense.batch_size * model.seq_len} tokens a step in the same order for every kind, AdamW with "
        f"weight decay {train.weight_decay:g} on matrices, gradient norm clipped to {train.clip_norm:g}, warm-up over "
        f"{train.warmup:.0%} of the steps, {SCHEDULES[train.schedule]}.",
        f"Placement of routed feed-forwards: {placement}, the same for every kind; Mixture-of-Depths wraps every other "
        "block.",
        "Rows are packed: attention stays within a document, and the documents of a row share the row's quota of "
        "Mixture-of-Depths.",
        "Intervals: paired t over seeds and ratio bootstrap over documents; p-values and verdicts are corrected for "
        "the number of kinds (Holm).",
    ]
    if any(split_kind(kind)[2] for kind in configs):
        said.append(TERNARY)
    if staged := [kind for kind in configs if kind.startswith("mod+")]:
        said.append(f"{', '.join(staged)}: staged MoDE, experts in every wrapped block, whatever the placement.")
    for kind, config in configs.items():
        # Staged MoDE has its feed-forwards inside the wrapped blocks.
        pairs = zip(model.blocks, [getattr(block, "inner", block) for block in config.model.blocks], strict=True)
        changed = [
            (old.ffn, new.ffn)
            for old, new in pairs
            if isinstance(new, BlockConfig) and isinstance(old, BlockConfig) and new != old
        ]
        # A precision changes every block, a kind only those where it is placed.
        placed = [(old, new) for old, new in changed if type(old) is not type(new) or split_kind(kind)[1] == "dense"]
        for old, new in placed[:1]:
            share = new.cost(model.d_model, 1).flops / old.cost(model.d_model, 1).flops
            said.append(f"{kind}: {share:.3f} of the dense feed-forward's FLOPs per token; {_words(new.model_dump())}")
    return said


def _words(settings: dict[str, Any]) -> str:
    """'moe (num_experts 8, top_k 2)': a layer's settings to read."""
    parts = [
        f"{k} {_words(v) if isinstance(v, dict) and 'kind' in v else v}" for k, v in settings.items() if k != "kind"
    ]
    return f"{settings['kind']} ({', '.join(parts)})"


def _warnings(result: dict[str, Any], seeds: int) -> list[str]:
    dense = next(row for row in result["rows"] if row["kind"] == "dense")
    bigram = result["baselines"]["bigram_bpb"]
    warnings = list(result["corpus"]["warnings"])
    if dense["bpb"] is not None and dense["bpb"] > bigram:
        warnings.append(
            f"dense ({dense['bpb']:.3f} bits per byte) has not reached a bigram count model ({bigram:.3f}): these "
            "models are still below a bigram, and a larger budget is needed before the comparison means anything"
        )
    unigram = result["baselines"]["unigram_bpb"]
    if weak := [row["kind"] for row in result["rows"] if row["bpb"] is not None and row["bpb"] > 0.9 * unigram]:
        warnings.append(f"{', '.join(weak)} did not beat a unigram count model ({unigram:.3f}) by 10 %: hardly trained")
    if not result["tuned"]:
        warnings.append("untuned: one learning rate for all kinds; --lr sweep gives each kind its own")
    if seeds == 1:
        warnings.append("one seed: intervals are over documents only, and no difference can be called resolved")
    if result["epochs"] > 4:
        warnings.append(f"{result['epochs']:.1f} epochs over the training text: repeated text distorts the comparison")
    for kind, tried in result["lr_sweep"].items():
        best = min(tried, key=lambda point: point["validation_bpb"])
        if best in (tried[0], tried[-1]):
            warnings.append(f"{kind}: the best learning rate {best['lr']:.3g} lies at the edge of its sweep")
    return warnings
