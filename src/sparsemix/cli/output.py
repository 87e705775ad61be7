"""How commands speak: results on standard output, everything else on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


def fail(message: str, code: int) -> NoReturn:
    # One line, whatever a library's message holds.
    print(f"sparsemix: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def interruptible(left: str = "what was done is saved, and the same command resumes") -> Iterator[None]:
    """Ctrl-C inside is one line that says what is left, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        fail(f"interrupted; {left}", 130)


def say(message: str) -> None:
    from rich.console import Console

    # Standard error, as the bars are: standard output holds the result alone.
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def show(tables: Any) -> None:
    from rich.console import Console

    console = Console()
    # A pipe or a file has no width of its own; a table must not be cut there.
    (console if console.is_terminal else Console(width=160)).print(tables)
