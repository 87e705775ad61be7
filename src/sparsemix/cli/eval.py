"""`sparsemix eval`. Heavy imports are inside: the command line answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsemix.cli.output import interruptible, say, show
from sparsemix.errors import ConfigError

SUITE_ONLY = ("data_dir", "only", "stride", "context", "max_documents", "tokens")


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
    out: Annotated[Path | None, typer.Option(help="File of the result; default: MODEL/eval.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON in place of tables.")] = False,
) -> None:
    """Causal perplexity and bits per byte on the papers' corpora, each with its standard error."""
    from sparsemix.config import parse
    from sparsemix.evaluate.corpora import read_suite
    from sparsemix.evaluate.suite import SuiteOptions, run_suite
    from sparsemix.report.eval_tables import suite_tables
    from sparsemix.sweep.watch import Stages
    from sparsemix.trained import load

    names = [name.strip() for words in only or [] for name in words.split(",") if name.strip()]
    corpora = read_suite(suite or "papers", names)
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"data_dir={data_dir} is no folder; name the folder that holds the corpora's files")
    given = {"stride": stride, "context": context, "max_documents": max_documents, "max_tokens": tokens}
    options = parse(SuiteOptions, given)
    trained = load(model)
    if trained.tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer; put the tokenizer.json that it was trained with into it")
    place = out or model / "eval.json"
    left = f"finished corpora are in {place}, and the same command resumes"
    with interruptible(left), Stages("eval", say) as stages:
        result = run_suite(trained.model, trained.tokenizer, corpora, data_dir, options, place, stages, say)
    if as_json:
        print(json.dumps(result | {"corpora": {name: result["corpora"][name] for name in corpora}}, indent=1))
    else:
        show(suite_tables(result, corpora))
    print(f"result: {place}", file=sys.stderr if as_json else sys.stdout)
