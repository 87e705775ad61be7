"""What is refused before torch is loaded, so that a slip of the finger is answered at once."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsemix.errors import ConfigError
from sparsemix.inputs import expanded, tried


def refuse(
    out: Path,
    what: str,
    text: Sequence[str] | None,
    recipe: str | None,
    overrides: Sequence[str] | None,
    decided: bool = False,
    budget: float | None = None,
) -> None:
    """Raises ConfigError for a recipe that is not there, settings that are none or break a rule, a text that is
    missing, and a folder that cannot be written or holds something else than `what`. `decided`: rate, budget, seed and
    text are not the recipe's to say; `budget`: the FLOPs of a run at the recipe's own size, where there is one."""
    from sparsemix.config import apply_overrides
    from sparsemix.recipes import settings_of
    from sparsemix.run import refuse_foreign

    settings = apply_overrides({}, overrides or ()) if recipe is None else settings_of(recipe, tuple(overrides or ()))
    if recipe is not None:
        _refuse_settings(settings, decided, budget)
    data = settings.get("data")
    data = data if isinstance(data, dict) else {}
    own = data.get("text", ()) if recipe is not None and not decided else ()
    # What may be wrong with these is for the settings to say, where they were not asked.
    sources, text_as = (given if isinstance(given, list) else () for given in (own, data.get("text_as")))
    refuse_texts(text or sources, text_as)
    tried(out, "out", folder=True)
    refuse_foreign(out, what)


def refuse_texts(sources: Iterable[str], text_as: Sequence[str] = ()) -> None:
    """Raises ConfigError for a text that is not there, or holds nothing to read."""
    from sparsemix.data.files import refuse_missing
    from sparsemix.data.hub import hub_parts

    for source in sources:
        if not source.strip():
            raise ConfigError("text= is empty; give a file, folder, glob, `stdlib` or hf:NAME:SPLIT")
        if source.startswith("hf:"):
            hub_parts(source)
        elif source != "stdlib":
            refuse_missing(source, text_as)


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


def _refuse_settings(raw: dict[str, Any], decided: bool, budget: float | None) -> None:
    from sparsemix.cli.outline import run_config
    from sparsemix.config import parse

    raw = raw | {"data": {"vocab_size": raw.get("model", {}).get("vocab_size", 1024), **raw.get("data", {})}}
    if decided:
        raw["train"] = {**raw.get("train", {}), "lr": 1.0, "budget_flops": budget or 1.0}
        raw |= {"seed": 0, "data": {**raw["data"], "text": ["stdlib"]}}
    if (outline := run_config(studies=decided)) is not None:
        # A rule that asks what torch computes finds no such name; the settings themselves ask it later.
        with suppress(NameError):
            config: Any = parse(outline, raw)
            if budget is not None or not decided:
                # The cost of a step, which widths that misfit have none of.
                assert config.steps


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
    from sparsemix.cli.outline import STUDIES, outlined
    from sparsemix.track import refuse_unknown

    refuse_misfit(source, name, settings, STUDIES)
    if (launched := outlined("sweep/launch/base", "launch_config", STUDIES)) is not None:
        launched(launcher, launch or (), workers)
    refuse_unknown(track)


def refuse_misfit(source: str, name: str, settings: Mapping[str, Any], also: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for settings that the class `name` of `source` refuses."""
    from sparsemix.cli.outline import outlined
    from sparsemix.config import parse

    if (known := outlined(source, name, also)) is not None:
        with suppress(NameError):
            parse(known, settings)


def refuse_kind(kind: str | None) -> None:
    """Raises ConfigError where there is no such kind of layer."""
    from sparsemix.cli.outline import outlined
    from sparsemix.config import parse

    known = outlined("layers/base", "LayerConfig")
    if kind is not None and known is not None and kind not in known.family:
        parse(known, {"kind": kind})


def refuse_sizes(*sizes: Any) -> None:
    """Raises ConfigError for sizes at which no layers can cost the same."""
    from sparsemix.cli.outline import outlined

    if (parity := outlined("layers/parity", "parity")) is not None:
        with suppress(NameError):
            parity(*sizes)


def trained_folder(model: Path) -> None:
    """Raises ConfigError where no trained model can be."""
    if not model.is_dir():
        what = "is a file" if model.exists() else "no such folder"
        raise ConfigError(f"{model}: {what}; name a run's folder, or a saved or exported model's")
    if not any((model / name).exists() for name in ("config.json", "config.yaml", "plan.yaml")):
        raise ConfigError(f"{model} is no model: it has no config.json; name a run's folder or a model's")
