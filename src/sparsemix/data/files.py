"""Files of text -> rows: one a text file, one a line of JSON lines, one a row of a parquet file."""

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from sparsemix.config import ConfigError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
_CHUNK = 1 << 20


class Row(NamedTuple):
    """The fields of one document and where they came from: `file`, or `file:line` inside a file of many documents."""

    name: str
    fields: dict[str, Any]


def find_files(source: str) -> list[Path]:
    """The files a source other than hf: stands for, sorted; empty when there are none."""
    if source == "stdlib":
        return [p for p in _walk(Path(sysconfig.get_path("stdlib")), _STDLIB_LEFT_OUT) if p.suffix == ".py"]
    path = Path(source).expanduser()
    if path.is_dir():
        return _walk(path, {"__pycache__"})
    if path.exists():
        return [path]
    try:
        matches = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except ValueError as error:
        raise ConfigError(f"{source} is no glob ({one_line(error)}); mend the pattern") from None
    return sorted(p for p in matches if p.is_file() and _supported(p))


def check_found(source: str, found: list[Path]) -> None:
    known = ", ".join(SUFFIXES)
    if not found:
        if source == "stdlib" or Path(source).expanduser().is_dir():
            raise ConfigError(f"{source}: the folder holds no supported file; put one of {known} into it")
        if any(c in source for c in "*?["):
            raise ConfigError(f"{source}: the glob matches no supported file; mend it (known: {known})")
        raise ConfigError(f"{source}: no such file or folder; give a file, folder, glob, `stdlib` or hf:NAME:SPLIT")
    if not _supported(found[0]):
        raise ConfigError(f"{source}: unknown suffix {found[0].suffix!r}; rename or convert it to one of {known}")


def _supported(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _walk(root: Path, left_out: set[str]) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
        found += [p for p in (Path(folder, n) for n in names if not n.startswith(".")) if _supported(p)]
    return sorted(found)


def read_rows(paths: Sequence[Path], columns: Sequence[str] = ("text",)) -> Iterator[Row]:
    """The rows of files, in order; a text file has the field `text` alone. Of a parquet file those of the `columns`
    that it has are read, all if it has none of them. Raises ConfigError for a file that cannot be read."""
    for path in paths:
        try:
            if path.name.lower().endswith(".parquet"):
                yield from _read_parquet(path, columns)
            elif ".jsonl" in path.name.lower():
                yield from _read_lines(path)
            else:
                yield Row(str(path), {"text": _decode(path.read_bytes(), path, 0)})
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{path} is truncated or corrupt ({one_line(error)}); fetch it again") from None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({one_line(error)}); check the file and its permissions"
            ) from None


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ConfigError(f"{path} is not UTF-8 at byte {at}; convert it to UTF-8 or leave it out") from None


def _read_lines(path: Path) -> Iterator[Row]:
    offset, tail, number = 0, b"", 0
    for chunk in _chunks(path):
        # A last line without a line feed comes out with the empty chunk that ends the file.
        *lines, tail = (tail + chunk).split(b"\n") if chunk else (tail, b"")
        for line in lines:
            number += 1
            if line.strip():
                name = f"{path}:{number}"
                yield Row(name, _parse(_decode(line, path, offset), name))
            offset += len(line) + 1


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file in chunks, then one empty chunk."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else Path.open
    with opener(path, "rb") as file:
        if path.name.lower().endswith(".zst"):
            yield from _unzstd(file)
        else:
            while chunk := file.read(_CHUNK):
                yield chunk
    yield b""


def _unzstd(file: Any) -> Iterator[bytes]:
    # Frame by frame: zstandard's own stream reader takes a truncated frame for the end of the file.
    decoder, frame = zstandard.ZstdDecompressor(max_window_size=1 << 31), None
    pending = file.read(_CHUNK)
    while pending:
        frame = frame or decoder.decompressobj()
        if chunk := frame.decompress(pending):
            yield chunk
        pending = b""
        if frame.eof:
            pending, frame = frame.unused_data, None
        pending = pending or file.read(_CHUNK)
    if frame is not None:
        raise EOFError("the last frame is not finished")


def _parse(line: str, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON ({one_line(error)}); mend or remove that line") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{name} is a JSON {type(row).__name__}; it must be an object with a field `text`")
    return row


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Without any of the columns the rows carry every field, so that an error can name them.
            held = [name for name in columns if name in file.schema_arrow.names]
            batches = file.iter_batches(columns=held or None)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield Row(f"{path}:{number}", row)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is truncated or corrupt parquet ({one_line(error)}); fetch it again") from None
