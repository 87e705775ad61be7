"""`sparsemix inspect`. Heavy imports are inside: the command line answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsemix.cli.early import refuse_texts
from sparsemix.cli.options import Text, TextAs
from sparsemix.cli.output import interruptible
from sparsemix.errors import ConfigError
from sparsemix.inputs import tried
from sparsemix.terminal import say, show


def inspect(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a comparison's: then the first seed of each kind.")],
    text: Text = None,
    text_as: TextAs = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on: the first of the text.")] = 65_536,
    out: Annotated[Path | None, typer.Option(help="Folder of the result; default: RUN/inspect.")] = None,
    data: Annotated[Path | None, typer.Option(help="The run's prepared text; default: beside the run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print inspect.json in place of the tables.")] = False,
) -> None:
    """Measure how a trained run routes: on --text, or on its own test split."""
    place = out or run / "inspect"
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; name a run's or a comparison's")
    if not any((run / name).exists() for name in ("config.yaml", "plan.yaml")):
        raise ConfigError(f"{run} is no run folder: it has no config.yaml; name a folder that a run wrote")
    refuse_texts(text or (), text_as or ())
    tried(place, "out", folder=True)

    from sparsemix.inspection import On, inspect_folder
    from sparsemix.report.inspect_page import write_inspection
    from sparsemix.report.inspect_tables import console_tables
    from sparsemix.sweep.watch import Stages

    with interruptible("no file is half-written; the same command starts anew"), Stages("inspect", say) as stages:
        result = inspect_folder(run, On(text or (), tokens, data, text_as or ()), stages)
        write_inspection(result, place)
    for line in dict.fromkeys(run["read"] for run in result["runs"]):
        say(line)
    if as_json:
        print((place / "inspect.json").read_text(encoding="utf-8"))
    else:
        show(console_tables(result))
    print(f"page: {place / 'inspect.html'}", file=sys.stderr if as_json else sys.stdout)
