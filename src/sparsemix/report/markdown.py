"""The comparison as Markdown: the tables of the page, to paste into an issue or a document."""

from collections.abc import Sequence
from typing import Any

from sparsemix.report.console import BASELINES, rests_on
from sparsemix.report.held_out import found_in_train
from sparsemix.report.numbers import duration, exponent, fixed, interval, p_value, percent, si


def to_markdown(result: dict[str, Any]) -> str:
    """Losses, costs, routing, learning rates and provenance of a result.json."""
    rows, corpus = result["rows"], result["corpus"]
    evaluated = corpus["evaluated"]
    parts = [
        f"`{result['command']}`",
        f"{result['scope']}",
        result.get("limits") or "",
        *(f"**Warning:** {text}" for text in result["warnings"]),
        markdown_table(
            ("kind", "bits/byte", "95 %", "perplexity", "vs dense", "95 %", "seeds x docs", "p (Holm)", "verdict"),
            [_loss_row(row) for row in rows]
            + [(name, fixed(result["baselines"][key], 4), *[""] * 6, "count model") for key, name in BASELINES.items()],
        ),
        markdown_table(
            (
                *("kind", "FLOPs/token", "causal evaluation", "active", "parameters", "bytes/token", "outside routed"),
                *("tokens", "tokens/s", "peak memory", "time a run"),
            ),
            [_cost_row(row) for row in rows],
        ),
        _routing(rows),
        _rates(result["lr_sweep"]),
        f"Text: {', '.join(corpus['sources'])}, {si(corpus['bytes'], 'B')}, {corpus['documents']} documents, SHA-256 "
        f"`{corpus['fingerprint']}`; tokenizer: {corpus['tokenizer']}. Test: {evaluated['documents']} documents, "
        f"{si(evaluated['bytes'], 'B')}, {si(evaluated['tokens'])} tokens; "
        f"{found_in_train(corpus.get('contamination'))}. Training: {result['epochs']:.2f} epochs at most. "
        "Count models are trained on the whole training split.",
        f"Hardware: {result['hardware']}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        f"Convention: {result['convention']}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _loss_row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["kind"],
        fixed(row["bpb"], 4),
        interval(row["bpb_ci"], 4),
        fixed(row["perplexity"], 2),
        fixed(row["difference"], 4, signed=True),
        interval(row["difference_ci"], 4, signed=True),
        rests_on(row),
        p_value(row["p_value"]),
        row["verdict"],
    )


def _cost_row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["kind"],
        si(row["flops_per_token"]),
        si(row["eval_flops_per_token"]),
        si(row["active_params"]),
        si(row["params"]),
        si(row["bytes_per_token"], "B"),
        percent(row["outside_share"], 0),
        si(row["tokens"]),
        si(row["tokens_per_s"]),
        si(row["peak_memory_bytes"], "B"),
        duration(row["wall_s"]),
    )


def _routing(rows: Sequence[dict[str, Any]]) -> str:
    """What routing did, in sentences; empty if nothing is routed."""
    lines = []
    for row in rows:
        if row["leak"] is not None:
            lines.append(
                f"- {row['kind']}: {fixed(row['lookahead_bpb'], 4)} bits/byte with the routing of training, leak "
                f"{fixed(row['leak'], 4, signed=True)}"
            )
        for layer, seen in row["routing"]["predictor"].items():
            lines.append(
                f"- {row['kind']} {layer}: predictor accuracy {percent(seen['accuracy'])} (always skipping "
                f"{percent(seen['always_skip'])}), precision {percent(seen['precision'])}, recall "
                f"{percent(seen['recall'])}, F1 {fixed(seen['f1'], 3)}, routed {percent(seen['routed_rate'])} of tokens"
            )
        for layer, seen in row["routing"]["experts"].items():
            lines.append(
                f"- {row['kind']} {layer}: {percent(seen['usage'])} of {seen['num_experts']} experts used, unevenness "
                f"{fixed(seen['unevenness'], 3)} nats, over {si(seen['tokens'])} tokens"
            )
    return "\n".join(lines)


def _rates(sweep: dict[str, list[dict[str, float]]]) -> str:
    rates = sorted({point["lr"] for points in sweep.values() for point in points})
    if not rates:
        return ""
    found = {kind: {point["lr"]: point["validation_bpb"] for point in points} for kind, points in sweep.items()}
    head = ("validation bits/byte at rate", *(exponent(rate) for rate in rates))
    return markdown_table(
        head, [(kind, *(fixed(tried.get(rate), 4) for rate in rates)) for kind, tried in found.items()]
    )
