"""The text that runs are compared on: its settings, prepared once, checked and described."""

from collections.abc import Callable
from pathlib import Path

from sparsemix.config import parse
from sparsemix.data import DataConfig, Shards, read_line
from sparsemix.data.tally import size_of
from sparsemix.recipes import settings_of
from sparsemix.report.held_out import found_in_train
from sparsemix.run import refusal_leaves_nothing
from sparsemix.settings import RunConfig


def data_config(recipe: str, overrides: tuple[str, ...], text: tuple[str, ...]) -> DataConfig:
    """The text, read with a recipe's vocabulary and its other data settings. Raises ConfigError."""
    raw = settings_of(recipe, overrides)
    vocab_size = raw.get("model", {}).get("vocab_size", 1024)
    return parse(DataConfig, {"vocab_size": vocab_size, **raw.get("data", {}), "text": text})


def prepared(out: Path, prepare: Callable[[], Shards], config: RunConfig) -> Shards:
    """The shards that `prepare` writes below `out`; a text too short for `config` leaves no folder that was not there.
    Raises ConfigError."""
    with refusal_leaves_nothing(out):
        shards = prepare()
        shards.num_windows(config.model.seq_len)
        return shards


def tell(shards: Shards, text: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Say what was read, how it was split, and what to beware of."""
    say(read_line(shards.manifest))
    say(described(shards, text))
    say(f"text: {found_in_train(shards.manifest.get('contamination'))}")
    for line in shards.manifest.get("warnings", ()):
        say(f"warning: {line}")


def described(shards: Shards, text: tuple[str, ...]) -> str:
    """What was read, in a line."""
    manifest = shards.manifest
    split = manifest["bytes"]
    return (
        f"text: {', '.join(text)}; {size_of(manifest['bytes_total'])} in "
        f"{sum(manifest['documents'].values())} documents (train {size_of(split['train'])}, validation "
        f"{size_of(split['validation'])}, test {size_of(split['test'])}), "
        f"{manifest['duplicates_dropped']} near-duplicates dropped, SHA-256 {manifest['fingerprint'][:16]}"
    )


def evaluated_tokens(config: RunConfig, shards: Shards) -> int:
    """Tokens that a run evaluates from its start to its end."""
    train, seq_len = config.train, config.model.seq_len
    often = shards.parts("validation", seq_len, train.eval_tokens).tokens
    once = shards.parts("test", seq_len, train.test_tokens).tokens
    return (train.evals + 1) * often + once * (2 if config.model.looks_ahead else 1)
