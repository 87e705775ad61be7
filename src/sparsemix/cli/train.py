"""`sparsemix train`. Heavy imports are inside: the command line answers at once."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemix.cli.options import Text
from sparsemix.cli.output import interruptible, say


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
    say(f"{config.steps} steps of {config.batch_size} x {config.model.seq_len} tokens")
    place = data or out.parent / f"data-{config_hash(parse(DataConfig, raw['data']))}"
    with interruptible():
        with Stages("data", say) as preparation:
            shards = prepare(config.data, place, preparation)
        config = config.replace(data=config.data.replace(fingerprint=shards.manifest["fingerprint"]))
        with Watch([out], "training", say) as watch:
            result = train_run(config, out, shards, lambda _: watch()).result
    assert result is not None
    print(f"{result['bpb']:.4f} bits per byte, perplexity {result['perplexity']:.2f} on {result['test_tokens']} tokens")
    print(f"run: {out}")
