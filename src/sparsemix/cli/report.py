"""`sparsemix report`. Heavy imports are inside: the command line answers at once, and a report needs no torch."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemix.errors import ConfigError, DamagedError
from sparsemix.inputs import read_mapping, tried, trusted
from sparsemix.terminal import say, show


def report(
    folders: Annotated[list[Path], typer.Argument(help="A comparison's folder; or studies', or runs'.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report; default: the one folder named.")] = None,
    baseline: Annotated[str, typer.Option(help="The arm that the others of a study are held against.")] = "dense",
    allow_repeats: Annotated[
        bool, typer.Option("--allow-repeats", help="Give verdicts even where the text was read more than 4 times.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
) -> None:
    """Write report.html anew from the folders of finished runs."""
    if out is not None or len(folders) == 1:
        tried(out or folders[0], "out", folder=True)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; name a comparison's, a study's or a run's")
    if len(folders) == 1 and (comparison := _comparison(folders[0])) is not None:
        with trusted(folders[0] / "result.json"):
            page = _compared(comparison, folders[0], out or folders[0], markdown)
    else:
        page = _studied(folders, out, baseline, allow_repeats, markdown)
    print(f"report: {page}", file=sys.stderr if markdown else sys.stdout)


def _comparison(folder: Path) -> dict[str, Any] | None:
    """A finished comparison's result, or None if the folder holds none."""
    path = folder / "result.json"
    if not path.exists():
        return None
    # A comparison's is made from its runs, which must not go for its sake.
    way_out = {"way_out": "the same `sparsemix compare` writes it anew"} if (folder / "plan.yaml").exists() else {}
    result = read_mapping(path, **way_out)
    return result if "rows" in result else None


def _compared(result: dict[str, Any], folder: Path, out: Path, markdown: bool) -> Path:
    from sparsemix.report.markdown import to_markdown
    from sparsemix.report.page import write_report

    # The page's links start at the page.
    for run in (run for row in result["rows"] for run in row.get("runs") or [] if run.get("folder")):
        run["folder"] = Path(os.path.relpath(folder / run["folder"], out)).as_posix()
    write_report(result, out / "report.html")
    if markdown:
        print(to_markdown(result))
    return out / "report.html"


def _studied(folders: list[Path], out: Path | None, baseline: str, allow_repeats: bool, markdown: bool) -> Path:
    from sparsemix.report.isoflop import analyse, ended
    from sparsemix.report.records import read_runs
    from sparsemix.report.study_page import write_study
    from sparsemix.report.study_tables import console, to_markdown

    if out is None and len(folders) > 1:
        raise ConfigError("several folders have one report: give --out with the folder that it goes to")
    place = out or folders[0]
    # A run that is named twice is one run.
    records = list({(r.folder.resolve(), r.arm, r.role): r for r in read_runs(folders, say)}.values())
    said = shlex.join(["sparsemix", *sys.argv[1:]])
    analysis = analyse(records, baseline=baseline, allow_repeats=allow_repeats, command=_command(place, said))
    page = write_study(analysis, place, ended(records), say)
    if markdown:
        print(to_markdown(analysis))
    else:
        show(console(analysis))
    return page


def _command(place: Path, said: str) -> str:
    """The command that made the study, which an earlier report or the study itself may know, or this one."""
    for path in (place / "analysis.json", place / "result.json"):
        try:
            held = read_mapping(path, "this report is told as made by itself") if path.is_file() else {}
        except DamagedError as error:
            say(f"{error}")
            continue
        if isinstance(known := held.get("command"), str):
            return known
    return said
