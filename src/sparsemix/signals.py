"""Ctrl-C and the SIGTERM of Slurm, Kubernetes and `docker stop`: what was done is saved, and the exit code says which
it was."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Terminated(SystemExit):
    """SIGTERM came. Where nobody catches it, the process ends with 143 after every block has cleaned up."""

    def __init__(self, code: int = 143) -> None:
        super().__init__(code)


# What stops work from outside: it is saved, and goes on to whoever waits for the work.
STOPS = (KeyboardInterrupt, Terminated)


def terminate(*_: object) -> None:
    """A handler of SIGTERM. Raises Terminated."""
    raise Terminated


def is_main_thread() -> bool:
    """Only the main thread may set handlers."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def answered(left: str) -> Iterator[None]:
    """A command: Ctrl-C and SIGTERM inside are one line that says what is left, and exit code 130 or 143."""
    before = None
    # A program that has a handler of its own keeps it.
    if is_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except STOPS as stop:
        code = stopped_code(stop)
        say_once(f"sparsemix: {'terminated' if code == 143 else 'interrupted'}; {left}")
        sys.exit(code)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def stopped_code(stop: BaseException) -> int:
    """The exit code that a shell gives what a signal ended."""
    return 143 if isinstance(stop, Terminated) else 130


def say_once(line: str) -> None:
    """Print on standard error, if somebody listens there."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def stops_wait() -> Iterator[list[type[BaseException]]]:
    """Ctrl-C and SIGTERM fill the list instead, and act at the end of the block: no checkpoint may hold half a step.

    Raises KeyboardInterrupt or Terminated there, whichever came first."""
    asked: list[type[BaseException]] = []
    usual: dict[int, tuple[Any, ...]] = {
        signal.SIGINT: (signal.default_int_handler,),
        signal.SIGTERM: (signal.SIG_DFL, terminate),
    }
    meant = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}

    def handler(kind: type[BaseException]) -> Callable[..., None]:
        return lambda *_: asked.append(kind)

    before: dict[int, Any] = {}
    if is_main_thread():
        # A program that has its own keeps it.
        for number, kind in meant.items():
            if (there := signal.getsignal(number)) in usual[number]:
                before[number] = there
                signal.signal(number, handler(kind))
    try:
        yield asked
    finally:
        for number, there in before.items():
            signal.signal(number, there)
    if asked:
        raise asked[0]
