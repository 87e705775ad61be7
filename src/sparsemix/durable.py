"""Files and folders that are there whole or not at all, and that say so themselves: what a kill, a full disk or a
flipped bit leaves is never taken for finished work."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SEAL = "checksums.json"
_CHUNK = 1 << 20


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or none of it; text as UTF-8, with an escape for what has no UTF-8 (half a letter, as in the
    name of a file that is not in UTF-8)."""
    with aside(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def aside(final: Path) -> Iterator[Path]:
    """A hidden path beside `final` at which the block makes a file or a folder. It is synced and gets the name `final`
    when the block ends, in place of a file that has it; nothing is left where the block fails. What killed processes
    left of `final` is deleted first."""
    clear(final)
    temporary = final.absolute().with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    guard = temporary.with_name(f"{temporary.name}.guard")
    try:
        with _held(guard):
            yield temporary
            _as_usual(temporary, guard)
            sync(temporary)
            temporary.replace(final)
            _sync_one(final.absolute().parent)
    finally:
        _delete(temporary)
        guard.unlink(missing_ok=True)


def clear(final: Path) -> None:
    """Delete what processes that are gone left of `final`; what a living one is writing stays."""
    for guard in final.absolute().parent.glob(f".{_literal(final.name)}.????????.partial.guard"):
        with contextlib.suppress(OSError):
            with _held(guard, new=False):
                _delete(guard.with_name(guard.name.removesuffix(".guard")))
            guard.unlink(missing_ok=True)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def _held(guard: Path, new: bool = True) -> Iterator[None]:
    """Hold a lock that the system frees when this process ends, however that is. Raises BlockingIOError where another
    holds it. Windows has no such locks: nothing is ever known to be left over there."""
    if sys.platform == "win32":
        if not new:
            raise BlockingIOError
        yield
        return
    import fcntl

    with guard.open("a" if new else "r+") as file:
        # A maker waits: whoever looks whether it lives holds the lock for a moment only.
        fcntl.flock(file, fcntl.LOCK_EX if new else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _as_usual(made: Path, guard: Path) -> None:
    """Give files that a library made for their owner alone the mode that this process gives its files (umask)."""
    if sys.platform == "win32":
        return
    mode = guard.stat().st_mode & 0o666
    for path in (made, *(made.rglob("*") if made.is_dir() else ())):
        if path.is_file() and not path.is_symlink() and (has := path.stat().st_mode & 0o777) != has | mode:
            path.chmod(has | mode)


def sync(path: Path) -> None:
    """Bring a file, or a folder with everything in it, to the disk."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            sync(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        # Some file systems know no sync of a folder; a file that cannot be synced is not safe.
        if not path.is_dir():
            raise
    finally:
        os.close(fd)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write size and SHA-256 of every file of a folder into its `checksums.json`. To be done last."""
    held = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    write_atomic(folder / SEAL, json.dumps(held, indent=1))


def damage(folder: Path) -> str | None:
    """What of a sealed folder is not as it was when it was sealed, in words; None if all of it is."""
    try:
        held = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name, was in held.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != was["bytes"]:
                return f"{name} has {size} of {was['bytes']} bytes"
            if sha256_of(path) != was["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {SEAL}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    return None
