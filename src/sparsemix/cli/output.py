"""How commands end early, and what they try before they begin."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


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
