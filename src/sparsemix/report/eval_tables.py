"""The tables of `sparsemix eval`, eighty columns wide."""

import math
from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsemix.report.numbers import DASH, SPACE, fixed, is_number, percent, si

Row = dict[str, Any]


def suite_tables(result: dict[str, Any]) -> Group:
    """A row for each corpus, those that are not available included, and what else was measured."""
    found = result["corpora"]
    parts: list[RenderableType] = [_losses(found)]
    if measured := [name for name, corpus in found.items() if corpus.get("routed")]:
        parts += ["", Text("tokens that Mixture-of-Depths layers took, of those that reached them")]
        parts += [_routed({name: found[name] for name in measured})]
    for name, corpus in found.items():
        if "not_available" in corpus:
            parts += ["", Text(f"{name}: not available: {corpus['not_available']}")]
    windows = {(c["asked"]["context"], c["asked"]["stride"]) for c in found.values() if "asked" in c}
    for context, stride in sorted(windows):
        parts += [
            "",
            Text(f"causal; windows of {context} tokens, stride {stride}; ± one standard error over documents"),
        ]
    return Group(*parts)


def task_table(tasks: dict[str, Any]) -> Table:
    """A line for every metric of tasks of lm-evaluation-harness."""
    table = Table(box=None, pad_edge=False)
    table.add_column("task", overflow="fold")
    for column in ("samples", "shots"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name, task in tasks.items():
        head = name, fixed(task["samples"], 0), fixed(task["num_fewshot"], 0)
        for metric, estimate in task["metrics"].items():
            table.add_row(*head, metric, measured(estimate))
            head = "", "", ""
    return table


def _losses(found: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("corpus", overflow="fold")
    for column in ("documents", "tokens", "bits per byte", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, corpus in found.items():
        if "not_available" in corpus:
            table.add_row(name, "not available", DASH, DASH, DASH)
            continue
        total, *sources = corpus["rows"]
        table.add_row(name, *_cells(total))
        for row in _beside(total):
            table.add_row(*row)
        for source in sources:
            table.add_row(f"  {_short(source['name'], sources)}", *_cells(source))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    return si(row["documents"]), si(row["tokens"]), measured(row["bits_per_byte"]), measured(row["perplexity"])


def _beside(row: Row) -> Iterable[tuple[str, ...]]:
    """Lines below a total: by word, and of the last word."""
    if "word_perplexity" in row:
        yield "  per word", "", si(row["words"]), "", measured(row["word_perplexity"])
    if "last_word" in row:
        right = row["last_word"]["accuracy"]
        error = fixed(None if right["error"] is None else 100 * right["error"], 1)
        said = f"{fixed(100 * right['value'], 1)} ± {error}{SPACE}% right"
        yield "  last word", "", "", said, measured(row["last_word"]["perplexity"])


def _short(name: str, rows: list[Row]) -> str:
    """A source without the path before it, where that leaves the names different."""
    short = [row["name"].rpartition("/")[2] for row in rows]
    return name.rpartition("/")[2] if len(set(short)) == len(short) else name


def measured(estimate: dict[str, Any]) -> str:
    """'2.0133 ± 0.0041': to the second digit of the standard error and at most four decimals; large ones as '49 M'."""
    value, error = estimate["value"], estimate["error"]
    if not is_number(value):
        return "not finite"
    if value >= 1e5:
        return f"{si(value)} ± {si(error) if is_number(error) else DASH}"
    if not is_number(error) or error == 0:
        decimals = max(0, _decimals(value, 4))
        return f"{fixed(value, decimals)} ± {fixed(error, decimals)}"
    decimals = min(4, _decimals(error, 2))
    return f"{fixed(round(value, decimals), max(0, decimals))} ± {fixed(round(error, decimals), max(0, decimals))}"


def _decimals(value: float, digits: int) -> int:
    """The decimal place of the value's digit of that number; negative before the point."""
    return digits - 1 - math.floor(math.log10(abs(value))) if value else digits


def _routed(found: dict[str, Any]) -> Table:
    """Share of the tokens that each Mixture-of-Depths layer took, of those that reached it."""
    table = Table(
        box=None,
        pad_edge=False,
    )
    table.add_column("corpus", overflow="fold")
    table.add_column("all layers", justify="right", no_wrap=True)
    layers = list(dict.fromkeys(path for corpus in found.values() for path in corpus["routed"]))
    # A deep model has more layers than a line has room: its ends stand for them, the file has all.
    shown = layers if len(layers) <= 5 else [*layers[:2], *layers[-2:]]
    for path in shown:
        table.add_column(path, justify="right", overflow="fold")
    for name, corpus in found.items():
        table.add_row(name, percent(corpus["routed_share"]), *(percent(corpus["routed"].get(path)) for path in shown))
    return table
