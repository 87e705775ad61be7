"""The outcome of a reproduction as files: result.json, table.md, figures, one offline page."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsemix.durable import write_atomic
from sparsemix.inputs import checked_json
from sparsemix.provenance import hardware, joined, versions
from sparsemix.report.isoflop import read_line
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Outcome
from sparsemix.reproduce.lab import Plan


def write(planned: Plan, outcome: Outcome, records: Sequence[Record], folder: Path, command: str) -> dict[str, Any]:
    """Everything below `folder`; returns what result.json holds."""
    from sparsemix.report.figure_files import write_figure
    from sparsemix.report.simple_page import Section, simple_page

    folder.mkdir(parents=True, exist_ok=True)
    said, scale = planned.entry, planned.scale
    result = {
        "name": said.name,
        "source": said.source,
        "claim": said.claim,
        "paper_numbers": {"how": said.how, **said.numbers},
        "scale": scale._asdict(),
        "command": command,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "trends": [trend._asdict() for trend in outcome.trends],
        "tables": [table._asdict() for table in outcome.tables],
        "notes": list(outcome.notes),
        "numbers": dict(outcome.numbers),
        "convention": records[0].convention,
        "corpus": {**records[0].settings["data"], "read": read_line(records)},
        "runs": [_run(record) for record in records],
        **made_by(records),
    }
    write_atomic(folder / "result.json", checked_json(result))
    write_atomic(folder / "table.md", markdown(planned, outcome) + f"{_told(result)}\n")
    for figure in outcome.figures:
        write_figure(figure, folder / "figures")
    trends = TextTable("What the paper claims", ("claim", "outcome", "evidence"), [tuple(t) for t in outcome.trends])
    about = [said.claim, f"Numbers of the paper: {said.how}. {_at(planned)}", result["convention"]]
    about.append(_told(result))
    about += [line] if (line := result["corpus"]["read"]) else []
    sections = [
        Section(said.source, about, [trends]),
        Section("Results", outcome.notes, outcome.tables, outcome.figures),
    ]
    write_atomic(folder / "report.html", simple_page(f"{said.name}: {said.source}", sections))
    return result


def made_by(records: Sequence[Record]) -> dict[str, Any]:
    """Versions, kernels and machines of the runs, and of what reads them now."""
    results = [record.result for record in records]
    machines = [{"hardware": result["hardware"]} for result in results if "hardware" in result]
    return {
        "versions": joined(*(result.get("versions", {}) for result in results), versions()),
        "kernels": joined(*(result.get("kernels", {}) for result in results)),
        **joined(*machines, {"hardware": hardware()}),
    }


def _told(result: Mapping[str, Any]) -> str:
    parts = [f"{name} {version}" for name, version in result["versions"].items()]
    kernels = ", ".join(f"{name} {impl}" for name, impl in result["kernels"].items()) or "none of sparsemix's"
    return f"Hardware: {result['hardware']}. Versions: {', '.join(parts)}. Kernels: {kernels}."


def markdown(planned: Plan, outcome: Outcome) -> str:
    """The tables and trends, to be pasted."""
    lines = [f"# {planned.entry.name}", "", f"{planned.entry.source}. {planned.entry.claim} {_at(planned)}", ""]
    lines += [f"- **{t.outcome}**: {t.claim} ({t.evidence})" for t in outcome.trends]
    for table in outcome.tables:
        lines += ["", f"{table.caption}:", "", *_rows(table)]
    return "\n".join([*lines, "", *outcome.notes, ""])


def _at(planned: Plan) -> str:
    seeds, budgets = planned.design.seeds, planned.design.budgets if planned.design.grid else (planned.design.budget,)
    return (
        f"Scale {planned.scale.name}: {', '.join(f'{b:.3g}' for b in budgets or ())} training FLOPs a run, "
        f"{seeds} seeds{' at the optima' if planned.design.grid else ''}."
    )


def _rows(table: TextTable) -> list[str]:
    return [
        f"| {' | '.join(table.columns)} |",
        "|" + " --- |" * len(table.columns),
        *(f"| {' | '.join(row)} |" for row in table.rows),
    ]


def _run(record: Record) -> dict[str, Any]:
    names = ("arm", "role", "budget", "seed", "lr", "params", "forward_flops", "tokens", "nats", "bpb", "lookahead_bpb")
    return {"run": record.folder.name, **{name: getattr(record, name) for name in names}}
