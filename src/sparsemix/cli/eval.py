"""`sparsemix eval`. Heavy imports are inside: the command line answers at once."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemix.cli.early import refuse_misfit, trained_folder
from sparsemix.cli.output import interruptible
from sparsemix.errors import ConfigError
from sparsemix.inputs import tried
from sparsemix.terminal import say, show


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a saved or exported model's.")],
    suite: Annotated[
        str | None, typer.Option(help="A suite (papers, the default), a corpus, or a YAML file of either.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where local files of the corpora are looked for.", envvar="SPARSEMIX_DATA")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Of the suite these corpora alone: c4,wikitext.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default: half of one.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a window; default: the model's seq_len.")] = None,
    max_documents: Annotated[int | None, typer.Option(help="Of each source the first N documents.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Of each source the first documents within N tokens.")] = None,
    tasks: Annotated[str | None, typer.Option(help="In place of a suite, tasks of lm-evaluation-harness: a,b.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with YAML files of own tasks.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question of a task.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Of each task the first N samples.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="File of the result; default: MODEL/eval.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON in place of tables.")] = False,
) -> None:
    """Causal perplexity and bits per byte on the papers' corpora, or lm-evaluation-harness's tasks."""
    place = out or model / "eval.json"
    trained_folder(model)
    tried(place, "out")
    if tasks is None:
        _only_with("--tasks", include_path=include_path, num_fewshot=num_fewshot, limit=limit)
        settings = {"stride": stride, "context": context, "max_documents": max_documents, "max_tokens": tokens}
        part, result, tables = _suite(model, suite or "papers", _names(only or []), data_dir, settings, place)
    else:
        given = {"suite": suite, "only": only, "stride": stride, "context": context, "tokens": tokens}
        _only_with("a suite", **given, max_documents=max_documents)
        options = {"include_path": include_path, "num_fewshot": num_fewshot, "limit": limit}
        part, result, tables = _tasks(model, _names([tasks]), options, place)
    if as_json:
        print(
            json.dumps(
                {name: value for name, value in result.items() if name not in ("corpora", "tasks")} | part, indent=1
            )
        )
    else:
        show(tables)
    print(f"result: {place}", file=sys.stderr if as_json else sys.stdout)


def _names(words: Iterable[str]) -> list[str]:
    return [name.strip() for word in words for name in word.split(",") if name.strip()]


def _only_with(what: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} goes with {what} only; leave it out")


def _opened(model: Path) -> tuple[Any, Any]:
    from sparsemix.trained import load

    trained = load(model)
    if trained.tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer; put the tokenizer.json that it was trained with into it")
    return trained.model, trained.tokenizer


def _suite(model: Path, suite: str, only: list[str], data_dir: Path | None, settings: dict[str, Any], out: Path) -> Any:
    """(what was asked for, all of the result, its tables)."""
    from sparsemix.evaluate.corpora import read_suite

    corpora = read_suite(suite, only)
    refuse_misfit("evaluate/suite", "SuiteOptions", settings)
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"data_dir={data_dir} is no folder; name the folder that holds the corpora's files")

    from sparsemix.config import parse
    from sparsemix.evaluate.suite import SuiteOptions, run_suite
    from sparsemix.report.eval_tables import suite_tables
    from sparsemix.sweep.watch import Stages

    options = parse(SuiteOptions, settings)
    found = _opened(model)
    left = f"finished corpora are in {out}, and the same command resumes"
    with interruptible(left), Stages("eval", say) as stages:
        result = run_suite(*found, corpora, data_dir, options, out, stages, say)
    return {"corpora": result["corpora"]}, result, suite_tables(result)


def _tasks(model: Path, tasks: list[str], options: dict[str, Any], out: Path) -> Any:
    """(what was asked for, all of the result, its tables)."""
    from sparsemix.durable import write_atomic
    from sparsemix.evaluate.suite import fingerprint, opened
    from sparsemix.inputs import checked_json
    from sparsemix.report.eval_tables import task_table

    try:
        from sparsemix.interop.harness import run_tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError("--tasks needs lm-evaluation-harness; install it: pip install 'sparsemix[eval]'") from None
    found = _opened(model)
    result = opened(out, fingerprint(*found))
    with interruptible("nothing was written"):
        measured = run_tasks(*found, tasks, **options)
    result["tasks"] = result.get("tasks", {}) | measured
    write_atomic(out, checked_json(result))
    return {"tasks": measured}, result, task_table(measured)
