"""How commands speak: results on standard output, everything else on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sparsemix.screen import console
from sparsemix.signals import answered


def fail(message: str, code: int) -> NoReturn:
    print(f"sparsemix: {message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def interruptible(left: str = "what was done is saved, and the same command resumes") -> Iterator[None]:
    """Ctrl-C and SIGTERM inside are one line that says what is left, and exit code 130 or 143."""
    with answered(left):
        yield


def say(message: str) -> None:
    # Standard error, as the bars are: standard output holds the result alone.
    console(highlight=False, soft_wrap=True).print(message, markup=False)


def show(tables: Any) -> None:
    from rich.console import Console

    console = Console()
    # A pipe or a file has no width of its own; a table must not be cut there.
    (console if console.is_terminal else Console(width=160)).print(tables)
