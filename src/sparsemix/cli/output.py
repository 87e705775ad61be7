"""How commands end early, and what they try before they begin."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

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
