"""How commands speak: results on standard output, all else on standard error, through one console each. Lines that are
printed while a bar moves then stand above it, and no name is taken for markup, whatever brackets it has."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@lru_cache(maxsize=1)
def notes() -> "Console":
    """Standard error: bars, lines on the way, warnings."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def say(message: str) -> None:
    """A line on standard error."""
    notes().print(message, soft_wrap=True)


def show(tables: Any) -> None:
    """Tables on standard output. A pipe or a file has no width of its own; a table must not be cut there."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    (console if console.is_terminal else Console(markup=False, emoji=False, width=160)).print(tables)
