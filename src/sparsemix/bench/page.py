"""docs/performance.md, written from a result of `sparsemix bench`; what is between its marks is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemix.bench import pictures
from sparsemix.bench.harness import SCHEMA, numbers, unmeasured
from sparsemix.bench.tables import amount, floor_of, time, verdict
from sparsemix.config import ConfigError
from sparsemix.durable import write_atomic
from sparsemix.inputs import load_json
from sparsemix.report.numbers import DASH, percent, si

BEGIN, END = "<!-- by hand: kept when the page is written anew -->", "<!-- end of what is kept -->"
NOTES = "Nothing was noted yet."
METHOD = """Every case runs its contenders in turn, in one process, in an order that turns from round to round; the
first call of each warms up. Before that, outputs and all gradients are compared, and where an optimizer takes part, how
far three of its steps move every parameter, with exact catch-up of untouched rows on our side. A case that disagrees
gets no ratio. Ratios are of minima. CPU time is that of all threads, user and system; page faults are minor ones, a
call. The share of the ceilings is the time that the case's matrix products and memory reads would take at the rates of
the first table, one after the other, over the time that ours took. Every work runs in a process of its own."""


def write_page(result_file: Path, page: Path | None = None) -> Path:
    """Writes the page and its figures beside it; the page of this checkout unless named. Raises ConfigError."""
    page = page or Path("docs") / "performance.md"
    result = load_json(result_file) if result_file.is_file() else {}
    if result.get("schema") != SCHEMA:
        raise ConfigError(
            f"--page {result_file} is no result of `sparsemix bench`; run it with --out {result_file} first"
        )
    if not page.parent.is_dir():
        raise ConfigError(f"{page.parent} is not here: --page writes {page} of a checkout; run it there")
    figures = page.with_suffix("")
    figures.mkdir(exist_ok=True)
    rows = [row for row in numbers(result) if row.get("met") is not None]
    if rows:
        write_atomic(figures / "floors.svg", pictures.floors(rows))
    curves = result["works"].get("scaling", {}).get("cases", [])
    if curves:
        write_atomic(figures / "growth.svg", pictures.growth(curves))
    kept = notes(page)
    write_atomic(page, "\n\n".join(sections(result, result_file, rows, bool(curves), kept)) + "\n")
    return page


def notes(page: Path) -> str:
    """What stands between the marks of the page that is there."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    between = text.partition(BEGIN)[2].partition(END)[0].strip()
    return between or NOTES


def sections(
    result: dict[str, Any], file: Path, rows: Sequence[dict[str, Any]], has_curves: bool, kept: str
) -> list[str]:
    """The page, part by part."""
    met = sum(row["met"] for row in rows)
    absent = unmeasured(result)
    parts = [
        "# Performance",
        f"Written by `sparsemix bench --page {file}` from a run of `{result['command']}`.",
        about(result),
        "## Floors",
        f"{met} of {len(rows)} measured floors are met. A goal is what is reached for beyond the floor.",
        *(["![Every number in units of its floor](performance/floors.svg)"] if rows else []),
        table(
            ("number", "", "measured", "floor (goal)", ""),
            [(r["id"], r["what"], amount(r["value"]), floor_of(r), verdict(r)) for r in rows],
        ),
        *([f"Not measured in this run: {', '.join(absent)}."] if absent else []),
        "## What is missed, and why",
        f"{BEGIN}\n\n{kept}\n\n{END}",
    ]
    if has_curves:
        figure = "![A step's time over each size, beside its formula](performance/growth.svg)"
        parts += [
            "## Growth",
            "A PEER step at growing sizes; the dashed line is its FLOPs through the first point.",
            figure,
        ]
    others = [row for row in numbers(result) if "floor" not in row]
    return [
        *parts,
        "## Other ratios",
        table(("number", "", "measured"), [(r["id"], r["refused"] or r["what"], amount(r["value"])) for r in others]),
        "## All times",
        METHOD,
        table(("case", "contender", "minimum", "median", "CPU", "page faults", "share of ceilings"), times(result)),
    ]


def about(result: dict[str, Any]) -> str:
    """Hardware, commit, versions and the ceilings of the machine."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in result["versions"].items())
    kernels = {op: impl for record in result["works"].values() for op, impl in record.get("kernels", {}).items()}
    lines = [
        ("date", result["created"]),
        ("hardware", f"{result['hardware']}; {result['threads']} threads"),
        ("commit", ", ".join(sorted({record.get("commit") or DASH for record in result["works"].values()}))),
        ("versions", versions),
        ("kernels", ", ".join(f"{op} {impl}" for op, impl in sorted(kernels.items())) or DASH),
    ]
    for case in result["works"].get("ceilings", {}).get("cases", []):
        lines += [(f"ceiling: {row['id'].partition('/')[2]}", si(row["value"], row["what"])) for row in case["numbers"]]
    if result["quick"]:
        lines.append(("note", "a trial with --quick: small sizes, few rounds, no result"))
    return table(("", ""), lines)


def times(result: dict[str, Any]) -> list[Sequence[str]]:
    """A row a contender."""
    rows: list[Sequence[str]] = []
    for name, record in result["works"].items():
        if record["said"] != "ok":
            rows.append((name, record["said"], *([DASH] * 5)))
        for case in record["cases"] if name != "ceilings" else []:
            for contender, row in case["contenders"].items():
                title = f"{name}, {case['name']}"
                if "peak_bytes" in row:
                    rows.append((title, contender, f"peak {si(row['peak_bytes'], 'B')}", *([DASH] * 4)))
                elif "min_s" not in row:
                    rows.append((title, f"{contender}: {row['said']}", *([DASH] * 5)))
                else:
                    share = case.get("share_of_ceilings") if contender == "ours" else None
                    spent = [time(row[key]) for key in ("min_s", "median_s", "cpu_s")]
                    rows.append((title, contender, *spent, si(round(row["faults"])), percent(share, 0)))
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; a stroke inside a cell must not end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
