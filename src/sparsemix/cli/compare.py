"""`sparsemix compare`. Heavy imports are inside: the command line answers at once."""

import shlex
import sys
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemix.cli.early import refuse, refuse_study
from sparsemix.cli.options import Launch, LauncherName, Set, Split, Text, TextAs, Track, Workers, text_settings
from sparsemix.cli.output import interruptible
from sparsemix.errors import TrainingError
from sparsemix.terminal import say, show


def compare(
    out: Annotated[Path, typer.Option(help="Folder of this comparison; the same command resumes it.")],
    text: Text = None,
    text_as: TextAs = None,
    split: Split = None,
    kinds: Annotated[
        str, typer.Option(help="What to compare, each perhaps as KIND@ternary; dense is the baseline.")
    ] = "dense,moe,peer,mh_moe,mod",
    budget: Annotated[str, typer.Option(help="Training FLOPs a run (1e13), or auto:TIME (auto:6min).")] = "auto:6min",
    seeds: Annotated[int, typer.Option(help="Seeds per kind; intervals need at least 2.")] = 3,
    lr: Annotated[str, typer.Option(help="A rate, `rule` (by width), or `sweep` (per kind, on validation).")] = "rule",
    placement: Annotated[str, typer.Option(help="Where routed feed-forwards go: middle, every-2, every.")] = "middle",
    recipe: Annotated[str, typer.Option(help="The dense backbone: a packaged recipe or a YAML file.")] = "tiny",
    override: Set = None,
    workers: Workers = None,
    launcher: LauncherName = "local",
    launch: Launch = None,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; only the text is kept.")] = False,
) -> None:
    """Train every kind at the same FLOP budget on the same text and report which is better."""
    overrides = (*(override or ()), *text_settings(text_as, split))
    refuse(out, "comparison", text, recipe, overrides, decided=True, budget=_flops(budget))
    settings = {
        "text": tuple(text or ("stdlib",)),
        "kinds": tuple(kind.strip() for kind in kinds.split(",")),
        "budget": budget,
        "seeds": seeds,
        "lr": lr,
        "placement": placement,
        "recipe": recipe,
        "overrides": overrides,
    }
    refuse_study("sweep/compare", "CompareConfig", settings, launcher, launch, workers, track)

    from sparsemix.config import parse
    from sparsemix.run import refusal_leaves_nothing
    from sparsemix.sweep.compare import CompareConfig, Comparison
    from sparsemix.sweep.launch import make_launcher
    from sparsemix.sweep.watch import Stages
    from sparsemix.track import tracking

    with refusal_leaves_nothing(out), interruptible(), tracking(track, out):
        config = parse(CompareConfig, settings)
        made = make_launcher(launcher, out, launch or (), workers, most=2 * len(config.kinds))
        comparison = Comparison(config, out, say, made, Stages("data", say))
        runs = comparison.run(dry_run)
    if not dry_run:
        _report(comparison, runs)


def _flops(budget: str) -> float:
    """The least that a run may spend: of a time, and of what is no budget, any number is left to say."""
    try:
        return flops if 0 < (flops := float(budget)) < inf else sys.float_info.max
    except ValueError:
        return sys.float_info.max


def _report(comparison: Any, runs: Any) -> None:
    from sparsemix.durable import write_atomic
    from sparsemix.inputs import checked_json
    from sparsemix.report.console import tables
    from sparsemix.report.page import write_report
    from sparsemix.sweep.summary import summarise

    result = summarise(comparison, runs, shlex.join(["sparsemix", *sys.argv[1:]]))
    write_atomic(comparison.out / "result.json", checked_json(result))
    write_report(result, comparison.out / "report.html")
    show(tables(result))
    print(f"report: {comparison.out / 'report.html'}")
    if comparison.diverged:
        raise TrainingError("; ".join(comparison.diverged))
