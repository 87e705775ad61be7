"""Every command. Heavy imports are inside them, so --help answers at once."""

import os
import sys

import typer

from sparsemix.bench.command import bench
from sparsemix.cli.clean import clean
from sparsemix.cli.compare import compare
from sparsemix.cli.convert import convert
from sparsemix.cli.eval import evaluate
from sparsemix.cli.export import export
from sparsemix.cli.generate import generate
from sparsemix.cli.inspect import inspect
from sparsemix.cli.isoflop import isoflop
from sparsemix.cli.listings import doctor, kinds, parity, recipes
from sparsemix.cli.output import fail
from sparsemix.cli.report import report
from sparsemix.cli.reproduce import reproduce
from sparsemix.cli.status import status
from sparsemix.cli.train import train
from sparsemix.errors import ConfigError, TrainingError

app = typer.Typer(
    name="sparsemix",
    help="Compare conditional-computation transformers at equal FLOPs, on your own text, with causal losses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# In the order of --help.
for command in (compare, isoflop, reproduce, train, status, clean, generate, inspect, report):
    app.command()(command)
app.command("eval")(evaluate)
for command in (convert, export, recipes, kinds, parity, bench, doctor):
    app.command()(command)


def run() -> None:
    """The command that was typed: what a user can mend is one line and exit code 2; a training that failed is 1."""
    # The Hugging Face libraries print notices that no user of this command needs.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app(args=spread_text(sys.argv[1:]))
    except ConfigError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"{error.filename or 'file system'}: {error.strerror}; free space or choose another folder", 2)
    except TrainingError as error:
        fail(str(error), 1)


def spread_text(args: list[str]) -> list[str]:
    """`--text a b` as `--text a --text b`: the shell makes a glob several words. `--text-as`, `--only` likewise."""
    spread: list[str] = []
    for i, word in enumerate(args):
        start = max((j for j in range(i) if args[j].startswith("-")), default=None)
        if (
            start is not None
            and args[start] in ("--text", "--text-as", "--only")
            and start < i - 1
            and not word.startswith("-")
        ):
            spread.append(args[start])
        spread.append(word)
    return spread
