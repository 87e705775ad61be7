"""`sparsemix train`. Heavy imports are inside: the command line answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemix.cli.early import refuse, refuse_nameless
from sparsemix.cli.options import Split, Text, TextAs, Track, text_settings
from sparsemix.cli.output import interruptible
from sparsemix.errors import ConfigError
from sparsemix.terminal import say


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A packaged recipe or a YAML file; `sparsemix recipes` lists them.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, such as train.lr=3e-3.")] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; the same command resumes it.")] = Path("runs/train"),
    text: Text = None,
    text_as: TextAs = None,
    split: Split = None,
    init_from: Annotated[
        Path | None, typer.Option(help="A saved model: its settings, tokenizer and weights in the recipe's place.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the prepared text; default: beside --out.")] = None,
    keep_memory: Annotated[bool, typer.Option(help="Keep freed memory between steps: faster on CPUs (glibc).")] = False,
    track: Track = None,
) -> None:
    """Train one model to its budget and evaluate it causally."""
    named = recipe if recipe is None or init_from is None or "=" not in recipe else None
    given = [*(overrides or ()), *text_settings(text_as, split)]
    refuse_nameless(recipe, init_from, track)
    refuse(out, "run", text, named, given if init_from is None else ())

    from sparsemix.config import config_hash, parse
    from sparsemix.data import DataConfig, prepare
    from sparsemix.machine import tune_cpu_allocator
    from sparsemix.run import refusal_leaves_nothing, refuse_other
    from sparsemix.settings import RunConfig
    from sparsemix.sweep.texts import tell
    from sparsemix.sweep.watch import Stages, Watch
    from sparsemix.track import tracking
    from sparsemix.train import train as train_run

    if keep_memory:
        tune_cpu_allocator()
    raw = _settings(recipe, given, init_from)
    if text:
        raw["data"]["text"] = tuple(text)
    config = parse(RunConfig, raw)
    refuse_other(out, config)
    say(f"{config.steps} steps of {config.batch_size} x {config.model.seq_len} tokens")
    if falling := config.still_falling:
        say(f"{', '.join(falling)}: more than the run has steps, so its capacity stays above the goal")
    place = data or out.parent / f"data-{config_hash(parse(DataConfig, raw['data']))}"
    # The text's folder goes with a refusal that comes after it, such as a text of no whole window.
    with refusal_leaves_nothing(place), refusal_leaves_nothing(out), interruptible(), tracking(track, out):
        with Stages("data", say) as preparation:
            shards = prepare(config.data, place, preparation)
        tell(shards, config.data.text, say)
        config = config.replace(data=config.data.replace(fingerprint=shards.manifest["fingerprint"]))
        with Watch([out], "training", say) as watch:
            result = train_run(config, out, shards, lambda _: watch()).result
    assert result is not None
    print(f"{result['bpb']:.4f} bits per byte, perplexity {result['perplexity']:.2f} on {result['test_tokens']} tokens")
    print(f"run: {out}")


def _settings(recipe: str | None, overrides: list[str], init_from: Path | None) -> dict[str, Any]:
    """Raw settings of the run: the recipe's, with the model and the tokenizer of `init_from` if there is one."""
    from sparsemix.config import apply_overrides
    from sparsemix.recipes import settings_of

    if init_from is None:
        assert recipe is not None
        raw = settings_of(recipe, overrides)
        raw["data"] = {"vocab_size": raw.get("model", {}).get("vocab_size", 1024), **raw.get("data", {})}
        return raw
    # With a model at hand the recipe may be left out, and the first word is then a setting.
    if recipe is not None and "=" in recipe:
        recipe, overrides = None, [recipe, *overrides]
    raw = {"train": {}} if recipe is None else settings_of(recipe)
    return apply_overrides(raw | _source(init_from, raw.get("data", {})), overrides)


def _source(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """The settings that come from a saved model, or from the one in a run's folder."""
    from sparsemix import saved
    from sparsemix.inputs import expanded

    folder = expanded(folder).resolve()
    folder = folder / "model" if (folder / "config.yaml").is_file() else folder
    config, fingerprint = saved.read_settings(folder), saved.fingerprint(folder)
    if saved.read_tokenizer(folder, config.vocab_size) is None:
        raise ConfigError(f"{folder} has no tokenizer.json to read text with; put the model's own there")
    return {
        "model": config.model_dump(mode="json"),
        "data": {**data, "tokenizer": str(folder / "tokenizer.json")},
        "init": {"folder": str(folder), "fingerprint": fingerprint},
    }
