"""Packaged recipes: a recipe is a YAML file that holds the settings of a run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemix.config import ConfigError, apply_overrides, load_yaml, nearest
from sparsemix.model import expand_blocks

FOLDER = Path(__file__).parent


def recipes() -> dict[str, Path]:
    """Name -> file of every packaged recipe."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_recipe(name: str) -> dict[str, Any]:
    """Raw settings of a packaged recipe, or of the YAML file at path `name`. Raises ConfigError."""
    known = recipes()
    if name in known:
        return load_yaml(known[name])
    if Path(name).suffix in (".yaml", ".yml"):
        return load_yaml(Path(name))
    raise ConfigError(f"recipe={name} is none of {', '.join(known)}, nor a .yaml file{nearest(name, known)}")


def settings_of(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Raw settings of a recipe with overrides applied; one that names a block by number (model.blocks.1.ffn.top_k=2)
    first writes a pattern of blocks out as a list. Raises ConfigError."""
    numbered = [o for o in overrides if re.match(r"model\.blocks\.\d", o)]
    raw = apply_overrides(load_recipe(name), [o for o in overrides if o not in numbered])
    if numbered and isinstance(raw.get("model"), dict):
        raw["model"] = expand_blocks(raw["model"])
    return apply_overrides(raw, numbered)


def purpose(path: Path) -> str:
    """The comment at the head of a recipe, in one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
