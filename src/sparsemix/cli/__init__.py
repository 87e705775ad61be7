"""The command line. What this file imports has Python itself loaded: before `main` runs, Ctrl-C is a traceback."""

# `signal` would import enum and what that needs, which takes longer than all of our own code before `main`.
import _signal  # pyright: ignore[reportMissingImports]
import os
import sys


def main() -> None:
    """Entry point of a process. Whenever Ctrl-C or SIGTERM comes, it is one line and exit code 130 or 143."""
    ours = _unclaimed()
    _leave_at_once(ours, "nothing was begun")
    # Importing the commands takes 0.1 s.
    from sparsemix.cli.app import run
    from sparsemix.signals import answered, terminate

    with answered("the same command starts anew"):
        try:
            raising = {_signal.SIGINT: _signal.default_int_handler, _signal.SIGTERM: terminate}
            for number in ours:
                _signal.signal(number, raising[number])
            run()
        finally:
            # What it ends with stands; no exception may meet Python while it tidies up.
            _leave_at_once(ours, "the command had ended")


def _unclaimed() -> list[int]:
    """The signals that nobody answers yet: a program that has a handler of its own keeps it."""
    usual = {_signal.SIGINT: _signal.default_int_handler, _signal.SIGTERM: _signal.SIG_DFL}
    return [number for number, there in usual.items() if _signal.getsignal(number) is there]


def _leave_at_once(numbers: list[int], left: str) -> None:
    """From now on these signals are one line and the end of the process. While modules are imported an exception would
    not do, for some take it for a fault of their own."""

    def leave(number: int, _: object) -> None:
        terminated = number == _signal.SIGTERM
        try:
            if sys.stderr is not None:
                os.write(2, f"sparsemix: {'terminated' if terminated else 'interrupted'}; {left}\n".encode())
        finally:
            os._exit(143 if terminated else 130)

    for number in numbers:
        _signal.signal(number, leave)
