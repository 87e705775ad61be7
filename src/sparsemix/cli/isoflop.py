"""`sparsemix isoflop`. Heavy imports are inside: the command line answers at once."""

import re
import shlex
import sys
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from sparsemix.cli.early import refuse, refuse_study
from sparsemix.cli.options import Launch, LauncherName, Set, Split, Text, TextAs, Track, Workers, text_settings
from sparsemix.cli.output import interruptible
from sparsemix.errors import ConfigError
from sparsemix.terminal import say, show


def isoflop(
    out: Annotated[Path, typer.Option(help="Folder of this study; the same command resumes it.")],
    budgets: Annotated[str, typer.Option(help="Training FLOPs of a run, one budget or several: 1e12,3e12.")],
    text: Text = None,
    text_as: TextAs = None,
    split: Split = None,
    kinds: Annotated[
        str, typer.Option(help="What to compare, each perhaps as KIND@ternary; dense is the baseline.")
    ] = "dense,moe,peer,mod",
    sizes: Annotated[
        str, typer.Option(help="auto (five around the predicted optimum), widths (48,64,80), or names of a recipe's.")
    ] = "auto",
    seeds: Annotated[int, typer.Option(help="Seeds at each kind's optimum.")] = 5,
    size_seeds: Annotated[
        int, typer.Option(help="Seeds at every other size: more tell a curve from its noise where models are small.")
    ] = 1,
    lr: Annotated[str, typer.Option(help="A rate, `rule` (by width), or `sweep` (per kind, on validation).")] = "rule",
    placement: Annotated[str, typer.Option(help="Where routed feed-forwards go: middle, every-2, every.")] = "middle",
    recipe: Annotated[str, typer.Option(help="The dense backbone: a packaged recipe or a YAML file.")] = "tiny",
    override: Set = None,
    workers: Workers = None,
    launcher: LauncherName = "local",
    launch: Launch = None,
    track: Track = None,
    retries: Annotated[int, typer.Option(help="Times that a run which failed is tried again.", min=0)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; only the text is kept.")] = False,
    allow_repeats: Annotated[
        bool, typer.Option("--allow-repeats", help="Give verdicts even where the text is read more than 4 times.")
    ] = False,
) -> None:
    """Find each kind's best size at a FLOP budget and compare the kinds there."""
    numbers = tuple(_number(word) for word in _words(budgets))
    overrides = (*(override or ()), *text_settings(text_as, split))
    refuse(out, "study", text, recipe, overrides, decided=True)
    settings = {
        "budgets": numbers,
        "text": tuple(text or ("stdlib",)),
        "kinds": _words(kinds),
        "sizes": None
        if sizes == "auto"
        else tuple(int(w) if re.fullmatch("[0-9]{1,9}", w) else w for w in _words(sizes)),
        "seeds": seeds,
        "size_seeds": size_seeds,
        "lr": lr,
        "placement": placement,
        "recipe": recipe,
        "overrides": overrides,
    }
    refuse_study("sweep/isoflop_study", "IsoflopConfig", settings, launcher, launch, workers, track)

    from sparsemix.config import parse
    from sparsemix.run import refusal_leaves_nothing
    from sparsemix.sweep.estimate import table
    from sparsemix.sweep.isoflop_study import IsoflopConfig, IsoflopStudy
    from sparsemix.sweep.launch import make_launcher
    from sparsemix.sweep.watch import Stages
    from sparsemix.track import tracking

    with refusal_leaves_nothing(out), interruptible(), tracking(track, out):
        study = IsoflopStudy(parse(IsoflopConfig, settings), out, say, retries)
        with Stages("data", say) as progress:
            study.prepare(progress)
        with make_launcher(launcher, out, launch or (), workers, most=2 * len(study.arms)) as made:
            show(table(study.plan(made), study.ladders, made.workers))
            if dry_run:
                return
            study.run(made)
        _report(out, allow_repeats)
        if failed := study.study.failed:
            say(
                f"{len(failed)} runs failed and are in no table: {', '.join(failed)}; the same command tries them again"
            )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _number(word: str) -> float:
    try:
        if 0 < (number := float(word)) < inf:
            return number
    except ValueError:
        pass
    raise ConfigError(f"budgets={word} must be FLOPs, such as 1e12 or 1e12,3e12")


def _report(out: Path, allow_repeats: bool) -> None:
    from sparsemix.report.isoflop import analyse, ended
    from sparsemix.report.records import read_runs
    from sparsemix.report.study_layers import routes
    from sparsemix.report.study_losses import largest_optima
    from sparsemix.report.study_page import write_study
    from sparsemix.report.study_tables import console

    # All that the folder holds, as `sparsemix report` reads it.
    records = read_runs([out], say)
    analysis = analyse(records, allow_repeats=allow_repeats, command=shlex.join(["sparsemix", *sys.argv[1:]]))
    folders = {id(run): record.folder for run, record in zip(analysis["runs"], ended(records), strict=True)}
    _inspect([folders[id(run)] for run in largest_optima(analysis).values() if routes(run)])
    page = write_study(analysis, out, ended(records), say)
    show(console(analysis))
    print(f"report: {page}")


def _inspect(folders: list[Path]) -> None:
    """`sparsemix inspect` of each of these runs that was not inspected yet, for the routing pictures of the page."""
    from sparsemix.inspection import On, inspect_folder
    from sparsemix.report.inspect_page import write_inspection
    from sparsemix.report.study_details import INSPECTION
    from sparsemix.sweep.watch import Stages

    with Stages("inspect", say) as stages:
        for folder in folders:
            place = folder / INSPECTION
            if place.is_file():
                continue
            try:
                write_inspection(inspect_folder(folder, On(), stages), place.parent)
            except ConfigError as error:
                say(f"not inspected: {error}")
