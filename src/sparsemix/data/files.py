"""Where text lies -> the files to read, and a word for everything there that is not read."""

import hashlib
import os
import stat
import sysconfig
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsemix.config import ConfigError
from sparsemix.data.tally import Tally
from sparsemix.inputs import expanded

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".txt", ".md", ".py", *LINES, ".parquet")
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
# Of files of one unknown suffix, the first so many are looked into; the others are taken for the same.
_LOOKED_INTO = 8
_SPECIAL = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def find_files(source: str, text_as: Sequence[str] = (), tally: Tally | None = None) -> list[Path]:
    """The files a source other than hf: stands for, sorted; empty when there are none. `text_as` are suffixes of
    further files to read as text. The tally gets what else is there. Linked folders are followed, each folder once.
    Raises ConfigError for a source that cannot be looked at."""
    look = _Look(text_as, tally if tally is not None else Tally())
    if source == "stdlib":
        # Its rule names what it leaves out, so that is not counted.
        look.tally = Tally()
        return [p for p in _below(Path(sysconfig.get_path("stdlib")), look, _STDLIB_LEFT_OUT) if p.suffix == ".py"]
    path = expanded(source)
    try:
        if _is_there(path):
            return _below(path, look, {"__pycache__"}) if stat.S_ISDIR(path.stat().st_mode) else [path]
        parts = path.parts[1:] if path.anchor else path.parts
        return _expand(Path(path.anchor), parts, look)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{shown(source)} is no glob ({one_line(error)}); mend the pattern") from None
    except RuntimeError as error:
        raise ConfigError(f"{shown(source)}: {one_line(error)}; write the folder out") from None
    except OSError as error:
        dangling = os.path.islink(source)  # noqa: PTH114 - a name may be too long to ask by Path
        why = "is a link that leads nowhere" if dangling else f"cannot be read ({error.strerror or error})"
        raise ConfigError(f"{shown(source)} {why}; mend it, or name another source") from None


def match(folder: Path, pattern: str, tally: Tally) -> list[Path]:
    """The files below a folder that a glob matches, sorted; the tally gets what else it matches."""
    return _expand(folder, Path(pattern).parts, _Look((), tally))


def check_found(source: str, found: Sequence[Path], text_as: Sequence[str] = (), tally: Tally | None = None) -> None:
    """Raises ConfigError if a source stands for no file, or names one that is not to be read."""
    known, name, path = ", ".join(SUFFIXES), shown(source), expanded(source)
    there = f" ({tally.skips()})" if tally is not None and tally.skipped else ""
    if not found:
        if source == "stdlib" or path.is_dir():
            raise ConfigError(f"{name}: the folder holds no supported file{there}; put one of {known} into it")
        if any(c in source for c in "*?["):
            raise ConfigError(f"{name}: the glob matches no supported file{there}; mend it (known: {known})")
        raise ConfigError(f"{name}: no such file or folder; give a file, folder, glob, `stdlib` or hf:NAME:SPLIT")
    mode = found[0].stat().st_mode
    if not stat.S_ISREG(mode):
        what = _SPECIAL.get(stat.S_IFMT(mode), "special file")
        raise ConfigError(f"{name} is a {what}, which can be read only once; write its text to a file first")
    look = _Look(text_as, Tally())
    if not look.supports(found[0]):
        why = look.unknown(found[0])[1]
        raise ConfigError(f"{name}: unknown suffix {found[0].suffix!r} ({why}); rename or convert it to one of {known}")


def refuse_missing(source: str, text_as: Sequence[str] = ()) -> None:
    """Raises ConfigError where reading would, as a source stands for no file; a folder is looked through to the first
    file only."""
    path, look = expanded(source), _Look(text_as, Tally())
    if path.is_dir() and any(look.takes(file) for _, files in _folders(path, look, {"__pycache__"}) for file in files):
        return
    tally = Tally()
    check_found(source, find_files(source, text_as, tally), text_as, tally)


def stamp(sources: Sequence[str], text_as: Sequence[str] = ()) -> str | None:
    """Changes when a source file does, judged by path, size and time; None if a source is not on this disk."""
    lines: list[str] = []
    for source in (s for s in sources if not s.startswith("hf:")):
        if not (files := find_files(source, text_as)):
            return None
        about = [(shown(p), p.stat()) for p in files]
        lines += [f"{name} {it.st_size} {it.st_mtime_ns}" for name, it in about]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_text_as(text_as: Sequence[str]) -> str | None:
    """The rule that suffixes to be read as text break, if any."""
    for suffix in text_as:
        if not suffix.startswith(".") or "/" in suffix:
            return "must be suffixes that begin with a dot, such as .asc, or `.` for names without one"
        if suffix.lower() in SUFFIXES or suffix.lower() in (".gz", ".zst"):
            return f"must not name {suffix}, which is read as what it is"
    return None


def shown(name: object) -> str:
    """A file's name as text that can be printed and encoded, also where it is not UTF-8."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return True


class _Look:
    """Which files are wanted; the tally gets the others."""

    def __init__(self, text_as: Sequence[str], tally: Tally) -> None:
        self.suffixes = (*SUFFIXES, *(s.lower() for s in text_as if s != "."))
        self.bare = "." in text_as
        self.tally = tally
        self.seen: Counter[str] = Counter()
        self.last: dict[str, str] = {}

    def supports(self, path: Path) -> bool:
        return path.name.lower().endswith(self.suffixes) or (self.bare and not path.suffix)

    def takes(self, path: Path) -> bool:
        """Whether a file found in a folder or by a glob is to be read."""
        try:
            mode = path.stat().st_mode
        except OSError as error:
            link = path.is_symlink()
            self.skip(path, "link" if link else "file", "leads nowhere" if link else f"{error.strerror}")
            return False
        if not stat.S_ISREG(mode):
            self.skip(path, _SPECIAL.get(stat.S_IFMT(mode), "special file"), "no file of text")
        elif not self.supports(path):
            self.skip(path, *self.unknown(path))
        elif not os.access(path, os.R_OK):
            self.skip(path, path.suffix.lower() or "no suffix", "no permission to read it")
        else:
            return True
        return False

    def unknown(self, path: Path) -> tuple[str, str]:
        """(the suffix, what such files are and whether they can be read by asking)."""
        suffix = path.suffix.lower()
        self.seen[suffix] += 1
        if self.seen[suffix] <= _LOOKED_INTO:
            self.last[suffix] = _content(path).format(suffix or ".")
        return suffix or "without suffix", self.last[suffix]

    def skip(self, path: Path, kind: str, why: str) -> None:
        self.tally.skip(kind, why, shown(path))


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        return f"unknown suffix and {error.strerror}".replace("{", "").replace("}", "")
    if any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head):
        return "not text"
    try:
        # What the end of the 4096 bytes cuts through is no fault.
        head.decode("utf-8") if len(head) < 4096 else head[:-4].rstrip(bytes(range(128, 256))).decode("utf-8")
    except UnicodeDecodeError:
        return "looks like text but not UTF-8, convert it"
    return "looks like text, --text-as {} reads it" if head else "empty"


def _below(root: Path, look: _Look, left_out: set[str]) -> list[Path]:
    """The files to read below a folder, sorted."""
    if not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(0, "Permission denied")
    return sorted(path for _, files in _folders(root, look, left_out) for path in files if look.takes(path))


def _folders(root: Path, look: _Look, left_out: set[str]) -> Iterator[tuple[Path, list[Path]]]:
    """(folder, what in it is no folder) of the root and all below it. Every folder comes once, under its own name
    before that of a link: so links that lead back end."""
    own, linked, seen = deque([root]), deque[Path](), set[tuple[int, int]]()
    while own or linked:
        folder = (own or linked).popleft()
        try:
            about = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            look.skip(folder, "folder", error.strerror or str(error))
            continue
        if (about.st_dev, about.st_ino) in seen:
            look.skip(folder, "linked folder", "is read by another name")
            continue
        seen.add((about.st_dev, about.st_ino))
        files = []
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                look.skip(path, "hidden", "name begins with a dot")
            elif not _is_folder(entry):
                files.append(path)
            elif entry.name in left_out:
                look.skip(path, entry.name, "never read")
            else:
                (linked if entry.is_symlink() else own).append(path)
        yield folder, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself; `takes` says so.
        return False


def _expand(base: Path, parts: Sequence[str], look: _Look) -> list[Path]:
    """The files to read that a glob matches, sorted; `**` goes through linked folders too, and not into hidden ones."""
    found = _matches(base, parts, look)
    files = {p for p in found if not p.is_dir()}
    for hidden in sorted(p for p in found if p.name.startswith(".") and not parts[-1].startswith(".")):
        look.skip(hidden, "hidden", "name begins with a dot")
        found.discard(hidden)
        files.discard(hidden)
    parents = {folder for p in files for folder in p.parents}
    for folder in sorted(found - files):
        if folder not in parents:
            look.skip(folder, "folder", "a glob's folders are not read")
    return sorted(p for p in files if look.takes(p))


def _matches(base: Path, parts: Sequence[str], look: _Look) -> set[Path]:
    if "**" not in parts:
        return set(base.glob(str(Path(*parts)))) if parts else set()
    at = parts.index("**")
    bases = {p for p in base.glob(str(Path(*parts[:at]))) if p.is_dir()} if at else {base}
    below = {folder: files for b in sorted(bases) for folder, files in _folders(b, look, set())}
    if not (rest := parts[at + 1 :]):
        return {p for files in below.values() for p in files}
    return {p for folder in below for p in _matches(folder, rest, look)}
