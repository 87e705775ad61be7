"""Packaged recipes: a recipe is a YAML file that holds the settings of a run."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemix.config import ConfigError, apply_overrides, load_yaml, nearest
from sparsemix.patterns import expand_blocks

FOLDER = Path(__file__).parent


def recipes() -> dict[str, Path]:
    """Name -> file of every packaged recipe."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_recipe(name: str) -> dict[str, Any]:
    """Raw settings of a packaged recipe, or of the YAML file at path `name`; `name:SIZE` picks one of its sizes, the
    first if none is named. Raises ConfigError.

    A recipe may have `base: OTHER`, whose settings it changes, and `sizes: {SIZE: {setting.by.path: value}}`, a family;
    a size of the base and the one of that name here both apply."""
    name, _, size = name.partition(":")
    raw = _merged(name)
    sizes = _sizes(name, raw.pop("sizes", {}))
    if size and size not in sizes:
        known = f"none of {', '.join(sizes)}{nearest(size, sizes)}" if sizes else "no size of it: it has none"
        raise ConfigError(f"recipe={name}:{size} is {known}")
    chosen = sizes.get(size or next(iter(sizes), ""), {})
    return _sectioned(name, apply_overrides(raw, [f"{path}={json.dumps(value)}" for path, value in chosen.items()]))


def sizes_of(name: str) -> list[str]:
    """The sizes of a recipe, smallest first; empty if it is no family."""
    return list(_sizes(name, _merged(name).get("sizes", {})))


def _sizes(name: str, sizes: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(sizes, dict) or not all(isinstance(chosen, dict) for chosen in sizes.values()):
        raise ConfigError(f"recipe={name}: sizes must be SIZE: {{setting.by.path: value}}")
    return sizes


def _sectioned(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The settings, of which those that hold others are mappings. Raises ConfigError."""
    for section in ("model", "data", "train", "init"):
        if section in raw and not isinstance(raw[section], dict) and (section != "init" or raw[section] is not None):
            held = type(raw[section]).__name__
            raise ConfigError(f"recipe={name}: {section} must hold settings (a mapping), not {held}")
    return raw


def _merged(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe over its base; `above` are those whose base it is."""
    known = recipes()
    if name not in known and Path(name).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"recipe={name} is none of {', '.join(known)}, nor a .yaml file{nearest(name, known)}")
    raw = load_yaml(known.get(name, Path(name)))
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str) or base in (*above, name):
        raise ConfigError(f"recipe={name}: base={base} must name another recipe, which is not built on this one")
    return _over(_merged(base, (*above, name)), raw)


def _over(base: Any, change: Any) -> Any:
    """Mappings merged key by key, anything else replaced; a new `kind` replaces its mapping whole."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    if change.get("kind", base.get("kind")) != base.get("kind"):
        return change
    return {**base, **{key: _over(base.get(key), value) for key, value in change.items()}}


def settings_of(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Raw settings of a recipe with overrides applied; one that names a block by number (model.blocks.1.ffn.top_k=2)
    first writes a pattern of blocks out as a list. Raises ConfigError."""
    numbered = [o for o in overrides if re.match(r"model\.blocks\.[0-9]", o)]
    raw = _sectioned(name, apply_overrides(load_recipe(name), [o for o in overrides if o not in numbered]))
    if numbered and "model" in raw:
        raw["model"] = expand_blocks(raw["model"])
    return _sectioned(name, apply_overrides(raw, numbered))


def purpose(path: Path) -> str:
    """The comment at the head of a recipe, in one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
