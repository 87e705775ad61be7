"""`sparsemix reproduce`. Heavy imports are inside: the command line answers at once."""

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemix.cli.early import refuse, refuse_study
from sparsemix.cli.options import Launch, LauncherName, Set, Split, Text, TextAs, Track, Workers, text_settings
from sparsemix.cli.output import interruptible
from sparsemix.errors import ConfigError, DamagedError
from sparsemix.inputs import read_mapping, trusted
from sparsemix.terminal import say, show


def reproduce(
    name: Annotated[str | None, typer.Argument(help="A table or figure (peer-table2); --list names them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder that reproductions of one text and scale share.")] = Path(
        "reproduce"
    ),
    scale: Annotated[str, typer.Option(help="demo, laptop, gpu, or paper (the published setting).")] = "demo",
    text: Text = None,
    text_as: TextAs = None,
    split: Split = None,
    budget: Annotated[float | None, typer.Option(help="Training FLOPs a run, in place of the scale's.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds, in place of the scale's.", min=1)] = None,
    override: Set = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the evaluation corpora, for tables of them.", envvar="SPARSEMIX_DATA"),
    ] = None,
    workers: Workers = None,
    launcher: LauncherName = "local",
    launch: Launch = None,
    track: Track = None,
    retries: Annotated[int, typer.Option(help="Times that a failed run is tried again.", min=0)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its FLOPs, and stop.")] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="Name every table and figure with its claim, and what came out in --out.")
    ] = False,
) -> None:
    """Make a table or figure of the papers anew, with their numbers beside ours and their claims as tests."""
    if listing:
        show(_listed(out))
        return
    if name is None:
        raise ConfigError("name a table or figure, such as peer-table2; `sparsemix reproduce --list` names them")
    from sparsemix.reproduce.entries import entry

    entry(name)
    given = {
        "text": tuple(text or ("stdlib",)),
        "scale": scale,
        "budget": budget,
        "seeds": seeds,
        "overrides": (*(override or ()), *text_settings(text_as, split)),
    }
    refuse_study("reproduce/lab", "ReproduceConfig", given, launcher, launch, workers, track)
    refuse(out, "study", text, None, given["overrides"])
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"data_dir={data_dir} is no folder; name the folder that holds the corpora's files")

    from sparsemix.config import parse
    from sparsemix.reproduce.lab import ReproduceConfig, plan
    from sparsemix.run import refusal_leaves_nothing
    from sparsemix.sweep.launch import make_launcher
    from sparsemix.track import tracking

    settings = parse(ReproduceConfig, given)
    planned = plan(name, settings)
    say(f"{name}: {planned.entry.source}. {planned.entry.claim}")
    runs = len({cell.run for cell in planned.cells})
    trials = f" and at least {planned.trials} that try learning rates" if planned.trials else ""
    say(f"{runs} runs{trials}, {planned.flops:.3g} training FLOPs in all, of which done ones are not trained again")
    if not dry_run:
        with refusal_leaves_nothing(out), interruptible(), tracking(track, out):
            made = make_launcher(launcher, out, launch or (), workers, most=len(planned.cells))
            _run(planned, settings, out, made, retries, data_dir)


def _run(planned: Any, settings: Any, out: Path, launcher: Any, retries: int, corpora: Path | None) -> None:
    from sparsemix.reproduce import lab
    from sparsemix.reproduce.write import write
    from sparsemix.sweep.study import Study
    from sparsemix.sweep.texts import prepared, tell
    from sparsemix.sweep.watch import Stages

    study = Study(out, settings, say)
    with Stages("data", say) as progress:
        text = lab.data_config(planned.design, settings)
        # A text with too few test documents is refused before anything trains.
        prepared(out, lambda: study.prepare(text, progress), planned.cells[0].config)
    tell(study.shards, text.text, say)
    planned = lab.plan(planned.entry.name, settings, study.data)
    with launcher as made:
        outcome, records = lab.run(planned, study, made, say, retries, corpora)
    folder = out / planned.entry.name
    write(planned, outcome, records, folder, shlex.join(["sparsemix", *sys.argv[1:]]))
    show(_tables(outcome))
    print(f"report: {folder / 'report.html'}")


def _tables(outcome: Any) -> Any:
    from rich.console import Group
    from rich.table import Table

    from sparsemix.report.simple_page import TextTable

    trends = TextTable("What the paper claims", ("claim", "outcome", "evidence"), [tuple(t) for t in outcome.trends])
    drawn = []
    for text in (*outcome.tables, trends):
        table = Table(*text.columns, title=text.caption)
        for row in text.rows:
            table.add_row(*row)
        drawn.append(table)
    return Group(*drawn, *outcome.notes)


def _listed(out: Path) -> Any:
    from rich.table import Table

    from sparsemix.reproduce.entries import entries

    done = {name: said for name in entries() if (said := _outcomes(out / name / "result.json"))}
    table = Table("name", "source", "claim", *([f"came out in {out}"] if done else []), title="Tables and figures")
    for entry in entries().values():
        table.add_row(entry.name, entry.source, entry.claim, *([done.get(entry.name, "–")] if done else []))
    return table


def _outcomes(result: Path) -> str:
    """'2 reproduced, 1 not resolved at this scale', empty where nothing came out yet; a damaged one is said."""
    if not result.is_file():
        return ""
    try:
        with trusted(result):
            held = read_mapping(result, "the same `sparsemix reproduce` writes it anew")
            counts = Counter(str(trend["outcome"]) for trend in held["trends"])
    except DamagedError as error:
        say(f"left out: {error}")
        return "damaged"
    return ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
