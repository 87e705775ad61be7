"""Standard error as the place where progress is shown: its reader may go and its disk may fill, the work goes on."""

import contextlib
import io
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")


class Screen(io.TextIOBase):
    """What `sys.stderr` is now. What cannot be written there (a closed terminal, a full disk) goes nowhere."""

    def __init__(self) -> None:
        # Rich puts a proxy of its own into sys.stderr while bars are shown, which writes here.
        self._to = sys.stderr

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


def console(**settings: Any) -> "Console":
    """Rich's console on standard error, to which writing never fails."""
    from rich.console import Console

    # Rich takes any text stream; its own type asks for all that a file can do.
    return Console(file=Screen(), stderr=True, **settings)  # pyright: ignore[reportArgumentType]


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
