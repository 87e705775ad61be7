"""Every command. Heavy imports are inside them, so --help answers at once."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sparsemix.bench.command import bench
from sparsemix.cli.clean import clean
from sparsemix.cli.compare import compare
from sparsemix.cli.convert import convert
from sparsemix.cli.ending import ended
from sparsemix.cli.eval import evaluate
from sparsemix.cli.export import export
from sparsemix.cli.generate import generate
from sparsemix.cli.inspect import inspect
from sparsemix.cli.isoflop import isoflop
from sparsemix.cli.listings import doctor, kinds, parity, recipes
from sparsemix.cli.report import report
from sparsemix.cli.reproduce import reproduce
from sparsemix.cli.status import status
from sparsemix.cli.train import train

app = typer.Typer(
    name="sparsemix",
    help="Compare conditional-computation transformers at equal FLOPs, on your own text, with causal losses.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# A setting by its path, as overrides name it.
SETTING = re.compile(r"(seed|(model|data|train|init)(\.[\w.]+)?)=")

# In the order of --help.
for command in (compare, isoflop, reproduce, train, status, clean, generate, inspect, report):
    app.command()(command)
app.command("eval")(evaluate)
for command in (convert, export, recipes, kinds, parity, bench, doctor):
    app.command()(command)


def run() -> NoReturn:
    """The command that was typed; how it ends is said in ending.py."""
    # The Hugging Face libraries print notices that no user of this command needs.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    ended(lambda: _run(sys.argv[1:]))


def _run(words: list[str]) -> None:
    # Not `app()`, which has its own way to end.
    command = typer.main.get_command(app)
    with command.make_context("sparsemix", spread_text(words) or ["--help"]) as context:
        command.invoke(context)


def _version(asked: bool) -> None:
    if asked:
        from sparsemix import __version__

        print(f"sparsemix {__version__}")
        raise typer.Exit


@app.callback()
def _of_all(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


def spread_text(args: list[str]) -> list[str]:
    """`--text a b` as `--text a --text b`: the shell makes a glob several words. `--text-as`, `--only` likewise.

    A setting among them (`--text a b train.lr=1`) is one: a word of its own for `train`, `--set` for other commands."""
    spread: list[str] = []
    for i, word in enumerate(args):
        start = max((j for j in range(i) if args[j].startswith("-")), default=i)
        option = args[start] if start < i - 1 and not word.startswith("-") else None
        if option in ("--text", "--text-as", "--only"):
            setting = option != "--only" and SETTING.match(word) and not Path(word).exists()
            spread += [] if setting and args[0] == "train" else ["--set" if setting else option]
        spread.append(word)
    return spread
