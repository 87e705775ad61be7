"""What a comparison or a study is doing between and before its runs, told to `sparsemix status` by its folder."""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsemix.durable import write_atomic

# The newest phase's name; who works holds the other file's lock, shared with others who work on the same folder.
PHASE, WORKING = ".phase", ".working"


class Phase:
    """Called with the name of what begins. It ends with the block of `working`, or with its process."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __call__(self, name: str) -> None:
        write_atomic(self.out / PHASE, name + "\n")


@contextmanager
def working(out: Path) -> Iterator[Phase]:
    """While the block runs, `phase_of(out)` is what the Phase was last called with. Makes the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / WORKING).open("a") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_SH)
        yield Phase(out)
    if not _is_held(out):
        for name in (PHASE, WORKING):
            (out / name).unlink(missing_ok=True)


def phase_of(out: Path) -> str | None:
    """What is done in a folder just now; None where nobody works there."""
    with contextlib.suppress(OSError):
        return (out / PHASE).read_text(encoding="utf-8", errors="replace").strip() if _is_held(out) else None
    return None


def _is_held(out: Path) -> bool:
    if sys.platform == "win32" or not (out / WORKING).is_file():
        return False
    import fcntl

    with (out / WORKING).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
