"""HTML tables that scroll inside their own box: what a comparison costs and how its layers route, kind by kind."""

from collections.abc import Sequence
from typing import Any

from sparsemix.report.numbers import (
    DASH,
    Markup,
    duration,
    escape,
    exponent,
    fixed,
    interval,
    is_number,
    p_value,
    percent,
    si,
)

Rows = Sequence[Sequence[object]]


def table(caption: str, columns: Sequence[str], *bodies: Rows, text: Sequence[int] = ()) -> Markup:
    """A table whose first cell of each row is its header. Bodies are set apart by a rule;
    the columns numbered in `text` are aligned left."""
    head = "".join(f'<th scope="col"{_text(i in text and i > 0)}>{escape(name)}</th>' for i, name in enumerate(columns))
    if not any(bodies):
        bodies = ([[DASH] * len(columns)],)
    parts = []
    for body in bodies:
        lines = []
        for first, *rest in body:
            cells = "".join(f"<td{_text(i in text)}>{escape(cell)}</td>" for i, cell in enumerate(rest, start=1))
            lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
        if lines:
            parts.append(f"<tbody>{''.join(lines)}</tbody>")
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>{''.join(parts)}</table></div>"
    )


def _text(left: bool) -> str:
    return ' class="text"' if left else ""


def cost_table(rows: Sequence[dict[str, Any]]) -> Markup:
    """Forward FLOPs per token by item, kinds as columns, with totals under other conventions, and memory."""
    rows = rows or [{}]
    names = list(dict.fromkeys(name for row in rows for name in row.get("cost_items") or {}))
    items = [[name, *(si((row.get("cost_items") or {}).get(name)) for row in rows)] for name in names]

    def line(label: str, key: str) -> list[object]:
        return [label, *(si(row.get(key)) for row in rows)]

    total = [line("forward, total", "flops_per_token")]
    other = [
        line("with causal-halved attention", "flops_per_token_causal_half"),
        line("without logits", "flops_per_token_no_logits"),
        line("spent by causal evaluation", "eval_flops_per_token"),
        line("training", "train_flops_per_token"),
        ["share outside the routed layers", *(percent(row.get("outside_share")) for row in rows)],
    ]
    memory = [
        line("parameters", "params"),
        line("active parameters per token", "active_params"),
        ["weight bytes read per token", *(si(row.get("bytes_per_token"), "B") for row in rows)],
    ]
    caption = "FLOPs per token by item, and what one token touches. A dash: the kind has no such item."
    columns = ["FLOPs per token", *(row.get("kind") for row in rows)]
    return table(caption, columns, items, total, other, memory)


def predictor_table(row: dict[str, Any]) -> Markup:
    """How well the causal predictors of one kind imitate the routing they were trained on, layer by layer."""
    lines = []
    for layer, seen in ((row.get("routing") or {}).get("predictor") or {}).items():
        capacity = seen.get("capacity")
        shares = [
            capacity,
            seen.get("routed_rate"),
            seen.get("accuracy"),
            1 - capacity if capacity is not None else None,
        ]
        scores = [fixed(seen.get(key), 3) for key in ("precision", "recall", "f1")]
        lines.append([layer, *(percent(share) for share in shares), *scores])
    caption = (
        "Causal predictors against the top-k routing of training. A constant “skip” is right for every token that is "
        "not routed, 1 − capacity of them; accuracy means something only above that."
    )
    columns = ["layer", "capacity", "routed", "accuracy", "constant “skip”", "precision", "recall", "F1"]
    return table(caption, columns, lines)


def experts_table(row: dict[str, Any]) -> Markup:
    """How evenly the tokens use the experts of one kind, layer by layer."""
    lines = [
        [
            layer,
            si(seen.get("num_experts")),
            percent(seen.get("usage")),
            fixed(seen.get("unevenness"), 3),
            si(seen.get("tokens")),
        ]
        for layer, seen in ((row.get("routing") or {}).get("experts") or {}).items()
    ]
    return table("Use of the experts.", ["layer", "experts", "usage", "unevenness (nats)", "tokens measured"], lines)


def ranked(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result by loss, best first; those without a finite loss last."""
    rows = result.get("rows") or []
    return sorted(rows, key=lambda row: row["bpb"] if is_number(row.get("bpb")) else float("inf"))


BASELINES = (
    ("uniform_bpb", "uniform"),
    ("unigram_bpb", "unigram"),
    ("bigram_bpb", "bigram"),
    ("fivegram_bpb", "5-gram"),
)


def comparison_table(result: dict[str, Any]) -> Markup:
    """Loss, interval and verdict of each kind, best first, and the baselines below."""
    columns = [
        "kind", "bits per byte", "95\u00a0% interval", "difference", "95\u00a0% interval", "p (Holm)", "verdict",
        "perplexity", "seeds", "effective documents",
    ]  # fmt: skip
    lines = [
        [
            row.get("kind"), fixed(row.get("bpb"), 4), interval(row.get("bpb_ci"), 4),
            fixed(row.get("difference"), 4, signed=True), interval(row.get("difference_ci"), 4, signed=True),
            p_value(row.get("p_value")), row.get("verdict"), fixed(row.get("perplexity"), 2),
            row.get("seeds", len(row.get("runs") or [])) or None, fixed(row.get("effective_documents"), 1),
        ]
        for row in ranked(result)
    ]  # fmt: skip
    known = result.get("baselines") or {}
    baselines = [[name, fixed(known.get(key), 4), *[""] * (len(columns) - 2)] for key, name in BASELINES]
    caption = "Loss under causal evaluation, best first; below, baselines that need no network."
    return table(caption, columns, lines, baselines, text=[6])


def speed_table(result: dict[str, Any]) -> Markup:
    """Tokens, size, speed, memory and time of each kind, in the order of the comparison."""
    columns = ["kind", "tokens", "parameters", "active parameters", "tokens/s", "peak memory", "time per run"]
    lines = [
        [
            row.get("kind"),
            *(si(row.get(key)) for key in ("tokens", "params", "active_params", "tokens_per_s")),
            si(row.get("peak_memory_bytes"), "B"),
            duration(row.get("wall_s")),
        ]
        for row in ranked(result)
    ]
    return table("Size, and speed in training on this hardware.", columns, lines)


def sizing_table(rows: Sequence[dict[str, Any]], budget: Any) -> Markup:
    """What each kind was given: FLOPs per token beside dense, tokens, compute beside the budget, seeds, rate."""
    dense = next((row.get("flops_per_token") for row in rows if row.get("kind") == "dense"), None)
    lines = []
    for row in rows:
        flops, runs = row.get("flops_per_token"), row.get("runs") or []
        seeds = ", ".join(escape(run.get("seed")) for run in runs) or None
        spent = _product(row.get("tokens"), row.get("train_flops_per_token"))
        lines.append(
            [
                row.get("kind"), si(flops), percent(_ratio(flops, dense)), si(row.get("tokens")), si(spent, "FLOP"),
                percent(_ratio(spent, budget)), exponent(row.get("lr")), seeds,
            ]
        )  # fmt: skip
    columns = [
        "kind",
        "forward FLOPs/token",
        "of dense",
        "tokens",
        "training compute",
        "of budget",
        "learning rate",
        "seeds",
    ]
    return table("What each kind was given.", columns, lines)


def _ratio(value: Any, base: Any) -> float | None:
    return value / base if is_number(value) and is_number(base) and base else None


def _product(a: Any, b: Any) -> float | None:
    return a * b if is_number(a) and is_number(b) else None


def leak_table(rows: Sequence[dict[str, Any]]) -> Markup:
    """Causal loss beside the loss with look-ahead, for the kinds whose training routes with later tokens."""
    lines = [
        [
            row.get("kind"),
            fixed(row.get("bpb"), 4),
            fixed(row.get("lookahead_bpb"), 4),
            fixed(row.get("leak"), 4, signed=True),
        ]
        for row in rows
    ]
    caption = (
        "Leak: loss with look-ahead (as in training) minus causal loss (as in generation). Negative: the look-ahead "
        "loss flatters. A dash: the kind never looks ahead. Every other number on this page is causal."
    )
    return table(caption, ["kind", "causal bits per byte", "with look-ahead", "leak"], lines)
