"""The command line. Heavy imports are inside the commands, so --help answers at once."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemix.bench.command import bench
from sparsemix.errors import ConfigError, TrainingError

app = typer.Typer(
    name="sparsemix",
    help="Compare conditional-computation transformers at equal FLOPs, on your own text, with causal losses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(bench)

Text = Annotated[
    list[str] | None, typer.Option("--text", help="Files, folders, globs, hf:NAME:SPLIT, or stdlib; one or more.")
]
DEFAULT_KINDS = "dense,moe,peer,mh_moe,mod"
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting, such as model.d_model=96. Repeatable.")]


def main() -> None:
    """Entry point: what a user can mend is one line and exit code 2; a training that failed is 1."""
    # The Hugging Face libraries print notices that no user of this command needs.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app(args=spread_text(sys.argv[1:]))
    except ConfigError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror}; free space or choose another folder", 2)
    except TrainingError as error:
        _fail(str(error), 1)


def spread_text(args: list[str]) -> list[str]:
    """`--text a b` as `--text a --text b`, for the shell expands a glob into several words; `--only` likewise."""
    spread: list[str] = []
    for i, word in enumerate(args):
        start = max((j for j in range(i) if args[j].startswith("-")), default=None)
        if start is not None and args[start] in ("--text", "--only") and start < i - 1 and not word.startswith("-"):
            spread.append(args[start])
        spread.append(word)
    return spread


def _fail(message: str, code: int) -> None:
    print(f"sparsemix: {message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def _interruptible(left: str = "what was done is saved, and the same command resumes") -> Iterator[None]:
    """Ctrl-C inside is one line that says what is left, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        _fail(f"interrupted; {left}", 130)


def _say(message: str) -> None:
    from rich.console import Console

    # Standard error, as the bars are: standard output holds the result alone.
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Folder of this comparison; the same command resumes it.")],
    text: Text = None,
    kinds: Annotated[
        str, typer.Option(help="What to compare, each perhaps as KIND@ternary; dense is the baseline.")
    ] = "dense,moe,peer,mh_moe,mod",
    budget: Annotated[str, typer.Option(help="Training FLOPs a run (1e13), or auto:TIME (auto:6min).")] = "auto:6min",
    seeds: Annotated[int, typer.Option(help="Seeds per kind; intervals need at least 2.")] = 3,
    lr: Annotated[str, typer.Option(help="A rate, `rule` (by width), or `sweep` (per kind, on validation).")] = "rule",
    placement: Annotated[str, typer.Option(help="Where routed feed-forwards go: middle, every-2, every.")] = "middle",
    recipe: Annotated[str, typer.Option(help="The dense backbone: a packaged recipe or a YAML file.")] = "tiny",
    override: Set = None,
    workers: Annotated[int | None, typer.Option(help="Runs at a time; default: one per core.", min=1)] = None,
) -> None:
    """Train every kind at the same FLOP budget on the same text and report which is better."""
    from sparsemix.config import parse
    from sparsemix.sweep.compare import CompareConfig, Comparison
    from sparsemix.sweep.watch import Stages

    settings = {
        "text": tuple(text or ("stdlib",)),
        "kinds": tuple(kind.strip() for kind in kinds.split(",")),
        "budget": budget,
        "seeds": seeds,
        "lr": lr,
        "placement": placement,
        "recipe": recipe,
        "overrides": tuple(override or ()),
    }
    with _interruptible(), Stages("data", _say) as preparation:
        comparison = Comparison(parse(CompareConfig, settings), out, _say, workers, preparation)
        runs = comparison.run()
    _report(comparison, runs)


def _report(comparison: Any, runs: Any) -> None:
    import json

    from sparsemix.report.console import tables
    from sparsemix.report.page import write_report
    from sparsemix.run import write_atomic
    from sparsemix.sweep.summary import summarise

    result = summarise(comparison, runs, shlex.join(["sparsemix", *sys.argv[1:]]))
    write_atomic(comparison.out / "result.json", json.dumps(result, indent=1))
    write_report(result, comparison.out / "report.html")
    _print(tables(result))
    print(f"report: {comparison.out / 'report.html'}")


def _print(tables: Any) -> None:
    from rich.console import Console

    console = Console()
    # A pipe or a file has no width of its own; a table must not be cut there.
    (console if console.is_terminal else Console(width=160)).print(tables)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe or a YAML file; `sparsemix recipes` lists them.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, such as train.lr=3e-3.")] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; the same command resumes it.")] = Path("runs/train"),
    text: Text = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the prepared text; default: beside --out.")] = None,
    keep_memory: Annotated[bool, typer.Option(help="Keep freed memory between steps: faster on CPUs (glibc).")] = False,
) -> None:
    """Train one model to its budget and evaluate it causally."""
    from sparsemix.config import config_hash, parse
    from sparsemix.data import DataConfig, prepare
    from sparsemix.machine import tune_cpu_allocator
    from sparsemix.recipes import settings_of
    from sparsemix.sweep.watch import Stages, Watch
    from sparsemix.train import RunConfig
    from sparsemix.train import train as train_run

    if keep_memory:
        tune_cpu_allocator()
    raw = settings_of(recipe, overrides or [])
    raw["data"] = {"vocab_size": raw.get("model", {}).get("vocab_size", 1024), **raw.get("data", {})}
    if text:
        raw["data"]["text"] = tuple(text)
    config = parse(RunConfig, raw)
    _say(f"{config.steps} steps of {config.batch_size} x {config.model.seq_len} tokens")
    place = data or out.parent / f"data-{config_hash(parse(DataConfig, raw['data']))}"
    with _interruptible():
        with Stages("data", _say) as preparation:
            shards = prepare(config.data, place, preparation)
        config = config.replace(data=config.data.replace(fingerprint=shards.manifest["fingerprint"]))
        with Watch([out], "training", _say) as watch:
            result = train_run(config, out, shards, lambda _: watch()).result
    assert result is not None
    print(f"{result['bpb']:.4f} bits per byte, perplexity {result['perplexity']:.2f} on {result['test_tokens']} tokens")
    print(f"run: {out}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A comparison's folder.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Also print the tables as Markdown.")] = False,
) -> None:
    """Write report.html anew from a comparison's result.json."""
    import json

    from sparsemix.report.markdown import to_markdown
    from sparsemix.report.page import write_report

    path = folder / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "rows" not in result:
        raise ConfigError(f"{folder} holds no finished comparison; run `sparsemix compare --out {folder}` first")
    write_report(result, folder / "report.html")
    if markdown:
        print(to_markdown(result))
    print(f"report: {folder / 'report.html'}", file=sys.stderr if markdown else sys.stdout)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a comparison's: then the first seed of each kind.")],
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on: the first of the text.")] = 65536,
    out: Annotated[Path | None, typer.Option(help="Folder of the result; default: RUN/inspect.")] = None,
    data: Annotated[Path | None, typer.Option(help="The run's prepared text; default: beside the run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print inspect.json in place of the tables.")] = False,
) -> None:
    """Measure how a trained run routes: on --text, or on its own test split."""
    from sparsemix.inspection import inspect_folder
    from sparsemix.report.inspect_page import write_inspection
    from sparsemix.report.inspect_tables import console_tables
    from sparsemix.sweep.watch import Stages

    place = out or run / "inspect"
    with _interruptible("no file is half-written; the same command starts anew"), Stages("inspect", _say) as stages:
        result = inspect_folder(run, text or [], tokens, data, stages)
        write_inspection(result, place)
    if as_json:
        print((place / "inspect.json").read_text(encoding="utf-8"))
    else:
        _print(console_tables(result))
    print(f"page: {place / 'inspect.html'}", file=sys.stderr if as_json else sys.stdout)


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    from rich.table import Table

    from sparsemix.recipes import FOLDER, purpose, sizes_of
    from sparsemix.recipes import recipes as packaged

    table = Table("recipe", box=None, pad_edge=False)
    table.add_column("what it is", overflow="fold")
    table.add_column("sizes, as NAME:SIZE; the first if none is named")
    for name, path in packaged().items():
        table.add_row(name, purpose(path), " ".join(sizes_of(name)))
    _print(table)
    print(f"files: {FOLDER}")


@app.command()
def kinds(
    kind: Annotated[str | None, typer.Argument(help="Show this kind alone.")] = None,
    d_model: Annotated[int, typer.Option(help="Model width at which costs are given.", min=16)] = 256,
    seq_len: Annotated[int, typer.Option(help="Sequence length at which costs are given.", min=1)] = 256,
) -> None:
    """List the kinds of layers with their settings and what an example of each costs."""
    from sparsemix.sweep.kinds import described

    _print(described(kind, d_model, seq_len))


@app.command()
def parity(
    d_model: Annotated[int, typer.Option(help="Model width.")] = 768,
    d_ff: Annotated[int, typer.Option(help="Width of the experts to match.")] = 2048,
    experts: Annotated[int, typer.Option(help="How many there are.")] = 8,
    top_k: Annotated[int, typer.Option(help="How many of them a token uses.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads of the multi-head layer.")] = 2,
    heads_top_k: Annotated[int | None, typer.Option(help="Experts a sub-token uses; default: as heads.")] = None,
    gated: Annotated[bool, typer.Option("--gated/--plain", help="Three matrices an expert, or two.")] = True,
    multiple_of: Annotated[int, typer.Option(help="Round the number of experts to a multiple of this.")] = 8,
    timed: Annotated[bool, typer.Option("--time", help="Also measure both: equal FLOPs are not equal time.")] = False,
) -> None:
    """Size a multi-head mixture of experts at the FLOPs and parameters of an ordinary one."""
    from sparsemix.layers.parity import parity as at_parity
    from sparsemix.sweep.parity import parity_tables, seconds_per_token, sparse_settings

    found = at_parity(d_model, d_ff, experts, top_k, heads, heads_top_k, gated, multiple_of)
    sparse = sparse_settings(experts, top_k, d_ff, found.activation)
    both = {"moe": sparse, "mh_moe": found.settings()}
    _print(parity_tables(found, sparse, seconds_per_token(both, d_model) if timed else None))


@app.command()
def doctor() -> None:
    """Say what this machine can run, which kernels it uses, and what would make it faster."""
    from rich.table import Table

    from sparsemix.doctor import examine

    table = Table("what", "found", box=None, pad_edge=False)
    table.add_column("advice", overflow="fold", style="yellow")
    for finding in examine():
        table.add_row(*finding)
    _print(table)


if __name__ == "__main__":
    main()
