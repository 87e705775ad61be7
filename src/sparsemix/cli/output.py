"""How commands end early."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from sparsemix.signals import answered, say_once

# Letters of a line that ends a command: no terminal shows more at once.
LONGEST = 4000


def fail(message: str, code: int) -> NoReturn:
    # One line, whatever a library's message holds.
    line = " ".join(message.split())
    # Where nobody listens, the exit code says it.
    say_once(f"sparsemix: {line if len(line) <= LONGEST else f'{line[:LONGEST]}…'}")
    sys.exit(code)


@contextmanager
def interruptible(left: str = "what was done is saved, and the same command resumes") -> Iterator[None]:
    """Ctrl-C and SIGTERM inside are one line that says what is left, and exit code 130 or 143."""
    with answered(left):
        yield
