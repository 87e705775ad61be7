"""Files and folders that are there whole or not at all, and that say so themselves: what a kill, a full disk or a
flipped bit leaves is never taken for finished work."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
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
    when the block ends, in place of a file or an empty folder that has it; nothing is left where the block fails. What
    killed processes left of `final` is deleted first.

    Raises FileExistsError, before the block and after it, where `final` is a folder that holds something: to replace
    one would leave a moment without any."""
    _refuse(final)
    with scratch(final) as temporary:
        yield temporary
        _as_usual(temporary)
        sync(temporary)
        _refuse(final)
        if final.is_dir():
            final.rmdir()
        temporary.replace(final)
        _sync_one(final.absolute().parent)


@contextmanager
def scratch(final: Path) -> Iterator[Path]:
    """A hidden path beside `final` for a file or a folder that is gone at the end of the block. What killed processes
    left of `final` is deleted first."""
    clear(final)
    temporary = final.absolute().with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    guard = _guard(temporary)
    try:
        with _held(guard):
            yield temporary
    finally:
        delete(temporary)
        guard.unlink(missing_ok=True)


def _guard(temporary: Path) -> Path:
    """The file whose lock says that the maker of `temporary` lives."""
    return temporary.with_name(f"{temporary.name}.guard")


def _refuse(final: Path) -> None:
    if final.is_dir() and any(final.iterdir()):
        raise FileExistsError(errno.EEXIST, "there is a folder with something in it", str(final))


def clear(final: Path) -> None:
    """Delete what processes that are gone left of `final`; what a living one is writing stays."""
    _clear(final.absolute().parent, _literal(final.name))


def clear_all(folder: Path) -> None:
    """Delete what processes that are gone left half-written in `folder`, whatever it was to be."""
    _clear(folder, "*")


def leftovers(folder: Path) -> list[Path]:
    """What `clear_all` would delete."""
    found = []
    for guard in sorted(folder.glob(".*.????????.partial.guard")):
        with contextlib.suppress(OSError), _held(guard, new=False):
            found.append(guard.with_name(guard.name.removesuffix(".guard")))
    return found


def _clear(folder: Path, name: str) -> None:
    for guard in folder.glob(f".{name}.????????.partial.guard"):
        with contextlib.suppress(OSError):
            with _held(guard, new=False):
                delete(guard.with_name(guard.name.removesuffix(".guard")))
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


def delete(path: Path) -> None:
    """Delete a file, a link or a folder with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _as_usual(made: Path) -> None:
    """Give files that a library made for their owner alone the mode that this process gives its files (umask)."""
    if sys.platform == "win32":
        return
    mode = _guard(made).stat().st_mode & 0o666
    for path in (made, *(made.rglob("*") if made.is_dir() else ())):
        if path.is_file() and not path.is_symlink() and (has := path.stat().st_mode & 0o777) != has | mode:
            path.chmod(has | mode)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is none."""
    found = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(each.lstat().st_size for each in found if each.is_symlink() or each.is_file())


def missing(folder: Path) -> list[Path]:
    """What would have to be made for `folder` to be there: itself first, then folders above it."""
    found, at = [], folder.absolute()
    while not at.exists():
        found.append(at)
        at = at.parent
    return found


@contextmanager
def undone(folder: Path, when: Callable[[BaseException], bool]) -> Iterator[None]:
    """Where the block raises what `when` is true of, `folder` is emptied of what was not in it before, and folders that
    were not there, above it too, are gone if they are empty."""
    before, made = (set(folder.iterdir()) if folder.is_dir() else set()), missing(folder)
    try:
        yield
    except BaseException as error:
        if when(error):
            for path in set(folder.iterdir()) - before if folder.is_dir() else ():
                delete(path)
            with contextlib.suppress(OSError):
                for each in made:
                    each.rmdir()
        raise


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


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write size and SHA-256 of the named files of a folder, or of every file in it, into its `checksums.json`. To be
    done last."""
    if names is None:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SEAL]
    held = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
    write_atomic(folder / SEAL, json.dumps(held, indent=1, sort_keys=True))


def damage(folder: Path, names: Collection[str] | None = None) -> str | None:
    """What of a sealed folder, or of its named files, is not as it was when it was sealed, in words; None if all is."""
    try:
        held = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name, was in held.items():
            if (names is None or name in names) and (told := _difference(folder / name, was["bytes"], was["sha256"])):
                return f"{name} {told}"
    except FileNotFoundError:
        return f"it has no {SEAL}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{SEAL} cannot be read"
    return None


def _difference(path: Path, size: int, sha256: str) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if (there := path.stat().st_size) != size:
            return f"has {there} of {size} bytes"
        return None if sha256_of(path) == sha256 else "is not what was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
