"""What is refused before torch is loaded, so that a slip of the finger is answered at once."""

from collections.abc import Sequence
from pathlib import Path

from sparsemix.errors import ConfigError
from sparsemix.inputs import expanded, tried


def refuse(out: Path, text: Sequence[str] | None, recipe: str | None, overrides: Sequence[str] | None) -> None:
    """Raises ConfigError for a recipe that is not there, overrides that are none, a text that is missing, and a folder
    that cannot be written."""
    if recipe is not None:
        from sparsemix.recipes import settings_of

        settings_of(recipe, tuple(overrides or ()))
    for source in text or ():
        elsewhere = source == "stdlib" or source.startswith("hf:") or any(c in source for c in "*?[")
        if not elsewhere and not expanded(source).exists():
            raise ConfigError(f"{source}: no such file or folder; give a file, folder, glob, `stdlib` or hf:NAME:SPLIT")
    tried(out, "out", folder=True)


def trained_folder(model: Path) -> None:
    """Raises ConfigError where no trained model can be."""
    if not model.is_dir():
        what = "is a file" if model.exists() else "no such folder"
        raise ConfigError(f"{model}: {what}; name a run's folder, or a saved or exported model's")
    if not any((model / name).exists() for name in ("config.json", "config.yaml", "plan.yaml")):
        raise ConfigError(f"{model} is no model: it has no config.json; name a run's folder or a model's")
