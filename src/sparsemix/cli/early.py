"""What is refused before torch is loaded, so that a slip of the finger is answered at once."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsemix.errors import ConfigError
from sparsemix.inputs import expanded, tried


def refuse(
    out: Path,
    text: Sequence[str] | None,
    recipe: str | None,
    overrides: Sequence[str] | None,
    decided: bool = False,
) -> None:
    """Raises ConfigError for a recipe that is not there, settings that are none or break a rule, a text that is
    missing, and a folder that cannot be written. `decided`: rate, budget, seed and text are not the recipe's to say."""
    if recipe is not None:
        _refuse_settings(recipe, tuple(overrides or ()), decided)
    for source in text or ():
        if not source.strip():
            raise ConfigError("text= is empty; give a file, folder, glob, `stdlib` or hf:NAME:SPLIT")
        elsewhere = source == "stdlib" or source.startswith("hf:") or any(c in source for c in "*?[")
        if not elsewhere and not os.path.lexists(expanded(source)):
            raise ConfigError(f"{source}: no such file or folder; give a file, folder, glob, `stdlib` or hf:NAME:SPLIT")
    tried(out, "out", folder=True)


def refuse_nameless(recipe: str | None, init_from: Path | None, track: str | None) -> None:
    """Raises ConfigError where neither a recipe nor a model says what to train, or the model or the tracker is none."""
    from sparsemix.track import refuse_unknown

    refuse_unknown(track)
    rule = "name a recipe (`sparsemix recipes` lists them) or a model with --init-from"
    if init_from is not None:
        trained_folder(expanded(init_from))
    elif recipe is None:
        raise ConfigError(rule)
    elif "=" in recipe and not os.path.lexists(expanded(recipe)):
        raise ConfigError(f"{recipe} is a setting, where the recipe belongs; {rule}, and settings after it")


def _refuse_settings(recipe: str, overrides: tuple[str, ...], decided: bool) -> None:
    from sparsemix.cli.outline import run_config
    from sparsemix.config import parse
    from sparsemix.recipes import settings_of

    raw = settings_of(recipe, overrides)
    raw["data"] = {"vocab_size": raw.get("model", {}).get("vocab_size", 1024), **raw.get("data", {})}
    if decided:
        raw["train"] = {**raw.get("train", {}), "lr": 1.0, "budget_flops": 1.0}
        raw |= {"seed": 0, "data": {**raw["data"], "text": ["stdlib"]}}
    if (outline := run_config(studies=decided)) is not None:
        # A rule that asks what torch computes finds no such name; the settings themselves ask it later.
        with suppress(NameError):
            parse(outline, raw)


def refuse_study(
    source: str,
    name: str,
    settings: Mapping[str, Any],
    launcher: str,
    launch: Sequence[str] | None,
    workers: int | None,
    track: str | None,
) -> None:
    """Raises ConfigError for settings that the study `name` of `source` refuses, for a launcher or a setting of it that
    is none, and for a tracker that is not there."""
    from sparsemix.cli.outline import outlined
    from sparsemix.config import parse
    from sparsemix.track import refuse_unknown

    study, launched = outlined(source, name), outlined("sweep/launch/base", "launch_config")
    with suppress(NameError):
        if study is not None:
            parse(study, settings)
    if launched is not None:
        launched(launcher, launch or (), workers)
    refuse_unknown(track)


def trained_folder(model: Path) -> None:
    """Raises ConfigError where no trained model can be."""
    if not model.is_dir():
        what = "is a file" if model.exists() else "no such folder"
        raise ConfigError(f"{model}: {what}; name a run's folder, or a saved or exported model's")
    if not any((model / name).exists() for name in ("config.json", "config.yaml", "plan.yaml")):
        raise ConfigError(f"{model} is no model: it has no config.json; name a run's folder or a model's")
