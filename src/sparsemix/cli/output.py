"""How commands end early, and what they try before they begin."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from sparsemix.errors import ConfigError

# Letters of a line that ends a command: no terminal shows more at once.
LONGEST = 4000


def fail(message: str, code: int) -> NoReturn:
    # One line, whatever a library's message holds.
    line = " ".join(message.split())
    # Where nobody listens, the exit code says it.
    with suppress(OSError, ValueError):
        print(f"sparsemix: {line if len(line) <= LONGEST else f'{line[:LONGEST]}…'}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def interruptible(left: str = "what was done is saved, and the same command resumes") -> Iterator[None]:
    """Ctrl-C inside is one line that says what is left, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        fail(f"interrupted; {left}", 130)


def trained_folder(model: Path) -> None:
    """Raises ConfigError, before torch is loaded, where no trained model can be."""
    if not model.is_dir():
        what = "is a file" if model.exists() else "no such folder"
        raise ConfigError(f"{model}: {what}; name a run's folder, or a saved or exported model's")
    if not any((model / name).exists() for name in ("config.json", "config.yaml", "plan.yaml")):
        raise ConfigError(f"{model} is no model: it has no config.json; name a run's folder or a model's")
