"""How commands speak: results on standard output, all else on standard error, through one console each. Lines that are
printed while a bar moves then stand above it, and no name is taken for markup, whatever brackets it has. What shows
progress ends no work: the reader of standard error may go and its disk may fill."""

import contextlib
import io
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")


class _StandardError(io.TextIOBase):
    """What `sys.stderr` is at the time. What cannot be written there (a closed terminal, a full disk) goes nowhere."""

    @property
    def _to(self) -> TextIO | None:
        # While bars are shown, Rich has a proxy in its place that prints through the console, and so writes here.
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            if self._to is not None:
                self._to.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._to is not None:
                self._to.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._to is not None and self._to.isatty()
        return False

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self._to, "encoding", None) or "utf-8"


@lru_cache(maxsize=1)
def notes() -> "Console":
    """Standard error, to which writing never fails: bars, lines on the way, warnings."""
    from rich.console import Console

    # Rich takes any text stream; its own type asks for all that a file can do.
    file: Any = _StandardError()
    return Console(file=file, stderr=True, markup=False, emoji=False, highlight=False)


def say(message: str) -> None:
    """A line on standard error."""
    notes().print(message, soft_wrap=True)


def show(tables: Any) -> None:
    """Tables on standard output. A pipe or a file has no width of its own; a table must not be cut there."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    (console if console.is_terminal else Console(markup=False, emoji=False, width=160)).print(tables)


class Display(Protocol):
    title: str
    say: Callable[[str], None]


D = TypeVar("D", bound=Display)


def only_shows(method: Callable[Concatenate[D, P], None]) -> Callable[Concatenate[D, P], None]:
    """A method of a display that can end no work: what it fails of is said once, and it shows nothing from then on."""

    @wraps(method)
    def shown(self: D, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if getattr(self, "_blind", False):
            return
        try:
            method(self, *args, **kwargs)
        # Whatever it is, trained steps are worth more than their picture.
        except Exception as error:
            self._blind = True  # pyright: ignore[reportAttributeAccessIssue]
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"{self.title}: progress is shown no more ({told}); the work goes on")

    return shown
