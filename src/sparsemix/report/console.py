"""The comparison as tables for a terminal."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparsemix.report.held_out import found_in_train
from sparsemix.report.numbers import DASH, duration, fixed, interval, si

BASELINES = {"uniform_bpb": "uniform", "unigram_bpb": "unigram", "bigram_bpb": "bigram", "fivegram_bpb": "5-gram"}


def rests_on(row: dict[str, Any]) -> str:
    """`3 x 14.2`: the seeds and the effective number of documents behind a row's intervals."""
    return f"{row.get('seeds', len(row.get('runs') or []))} x {fixed(row.get('effective_documents'), 1)}"


def tables(result: dict[str, Any]) -> Group:
    """Losses with verdicts, costs, and what each run took, then warnings."""
    loss = Table(
        title="Causal loss on held-out documents",
        caption=result.get("limits") or "95 % intervals; negative differences are better",
    )
    for name in ("kind", "bits/byte", "interval", "perplexity", "vs dense", "interval", "seeds x docs", "verdict"):
        loss.add_column(name, justify="left" if name in ("kind", "verdict") else "right")
    for row in result["rows"]:
        loss.add_row(
            row["kind"],
            fixed(row["bpb"], 4),
            interval(row["bpb_ci"], 4),
            fixed(row["perplexity"], 2),
            fixed(row["difference"], 4, signed=True),
            interval(row["difference_ci"], 4, signed=True),
            rests_on(row),
            row["verdict"],
        )
    loss.add_section()
    for key, name in BASELINES.items():
        loss.add_row(name, fixed(result["baselines"][key], 4), *[DASH] * 5, "count model")
    cost = Table(title="Cost and speed")
    columns = (
        "kind",
        "FLOPs/token",
        "active",
        "params",
        "bytes/token",
        "outside",
        "tokens",
        "tokens/s",
        "memory",
        "time",
    )
    for name in columns:
        cost.add_column(name, justify="left" if name == "kind" else "right")
    for row in result["rows"]:
        cost.add_row(
            row["kind"],
            si(row["flops_per_token"]),
            si(row["active_params"]),
            si(row["params"]),
            si(row["bytes_per_token"], "B"),
            f"{row['outside_share']:.0%}",
            si(row["tokens"]),
            si(row["tokens_per_s"]),
            si(row["peak_memory_bytes"], "B"),
            duration(row["wall_s"]),
        )
    seen = Text(f"{found_in_train(result['corpus'].get('contamination'))}")
    return Group(loss, cost, seen, *(Text(f"warning: {text}", style="yellow") for text in result["warnings"]))
