"""How every command ends: whatever escapes it is one line on standard error and an exit code.

2: what a user can mend, named with the way out. 1: training failed, or a fault of ours, with its traceback in a file.
Ctrl-C and SIGTERM are signals.py's to answer."""

import contextlib
import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer

from sparsemix.cli.output import fail
from sparsemix.errors import ConfigError, TrainingError
from sparsemix.signals import STOPS

# The root of typer's own errors, which it takes from click or brings along, by version.
UsageError, ClickError = typer.BadParameter.__mro__[1:3]
WAY_OUT = {
    errno.ENOSPC: "free space or choose another folder",
    errno.EDQUOT: "free space or choose another folder",
    errno.EFBIG: "allow larger files (ulimit -f), or choose another folder",
    errno.EACCES: "choose another place, or ask for the right to it",
    errno.EPERM: "choose another place, or ask for the right to it",
    errno.EROFS: "choose another folder: this one cannot be written",
    errno.ENOENT: "name one that is there",
    errno.ENOTDIR: "a part of this path is a file; name another",
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENOMEM: "use a smaller model or batch, or a machine with more memory",
}


def ended(command: Callable[[], None]) -> NoReturn:
    """Run a command to its end and leave with its exit code; what stops it from outside goes on to `answered`."""
    _printable()
    try:
        command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except STOPS:
        raise
    except SystemExit as end:
        # Rich ends a program whose reader has seen enough, and by 1.
        if isinstance(end.__context__, BrokenPipeError):
            _leave(end.__context__)
        raise
    except BaseException as error:
        _leave(error)
    sys.exit(0)


def _printable() -> None:
    """What a stream has no letters for (an ASCII terminal, a file name that is no UTF-8) is shown as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave(error: BaseException) -> NoReturn:
    if isinstance(error, typer.Exit):
        sys.exit(error.exit_code)
    if isinstance(error, BrokenPipeError):
        # The reader, such as `head`, has seen enough.
        forget_output()
        sys.exit(0)
    if isinstance(error, ClickError):
        fail(_usage(error), 2)
    if isinstance(error, ConfigError):
        fail(str(error), 2)
    if isinstance(error, TrainingError):
        fail(str(error), 1)
    if isinstance(error, MemoryError):
        fail(f"out of memory; {WAY_OUT[errno.ENOMEM]}", 2)
    if isinstance(error, OSError):
        forget_output()
        fail(_system(error), 2)
    fail(f"{_told(error)}: a fault of sparsemix, not of yours; please report it with {_traceback(error)}", 1)


def forget_output() -> None:
    """What standard output could not take must not be tried again when Python ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: BaseException) -> str:
    """`No such option: --foo; \\`sparsemix train --help\\` lists what there is`."""
    said = error.format_message().rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
    context = getattr(error, "ctx", None)
    path = "sparsemix" if context is None else context.command_path
    return f"{said[:1].lower()}{said[1:]}; `{path} --help` lists what there is"


def _system(error: OSError) -> str:
    what = error.strerror or str(error)
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    way_out = WAY_OUT.get(error.errno or 0)
    return f"{where}{what}" + ("" if way_out is None else f"; {way_out}")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _traceback(error: BaseException) -> str:
    """The file that the traceback was written to, in words; it stays, for the report."""
    lines = [f"sparsemix {' '.join(sys.argv[1:])}\n\n", *traceback.format_exception(error)]
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="sparsemix-fault-", suffix=".txt")
        os.close(handle)
        Path(name).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        return f"the traceback in {name}"
    return f"this traceback: {' | '.join(''.join(lines).splitlines())}"
