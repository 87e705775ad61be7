"""Files -> rows: one a text file, one a line of JSON lines, one a row of a parquet file. Memory holds one of them."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from sparsemix.config import ConfigError
from sparsemix.data.files import LINES, one_line, shown
from sparsemix.data.tally import Tally

MAX_LINE = 1 << 28
"""Bytes of one JSON line: it is parsed as a whole, and takes several times its size meanwhile."""
_CHUNK = 1 << 20
# A few bytes of zstandard can stand for very many: what a slice expands to has to fit into memory.
_ZSTD_SLICE = 1 << 12


class Row(NamedTuple):
    """The fields of one document and where they came from: `file`, or `file:line` inside a file of many documents."""

    name: str
    fields: dict[str, Any]


def read_rows(
    paths: Sequence[Path],
    columns: Sequence[str] = ("text",),
    max_chars: int | None = None,
    tally: Tally | None = None,
) -> Iterator[Row]:
    """The rows of files, in order; a text file has the field `text` alone, and comes in several rows of one name if it
    has more than `max_chars` characters. Of a parquet file those of the `columns` that it has are read (a dot leads
    into a column of fields). Raises ConfigError for a file that cannot be read."""
    tally = tally if tally is not None else Tally()
    for path in paths:
        tally.files += 1
        name = path.name.lower()
        try:
            if name.endswith(".parquet"):
                yield from _read_parquet(path, columns)
            elif name.endswith(LINES):
                yield from _read_lines(path, tally)
            else:
                yield from _read_text(path, max_chars, tally)
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{shown(path)} is truncated or corrupt ({one_line(error)}); fetch it again") from None
        except OSError as error:
            raise ConfigError(
                f"{shown(path)} cannot be read ({one_line(error)}); check the file and its permissions"
            ) from None


def cut(texts: Iterable[str], max_chars: int) -> Iterator[str]:
    """A text that comes in pieces -> pieces of at most max_chars characters that make up the same, each as long as
    can be and ending with a paragraph, else a line, else a word, if there is one in its second half."""
    held = ""
    for text in texts:
        held, start = held + text, 0
        while len(held) - start > max_chars:
            end = start + max_chars
            found = (held.rfind(mark, start + max_chars // 2, end) + len(mark) for mark in ("\n\n", "\n", " "))
            at = next((at for at in found if at > start + max_chars // 2), end)
            yield held[start:at]
            start = at
        held = held[start:]
    if held:
        yield held


def _read_text(path: Path, max_chars: int | None, tally: Tally) -> Iterator[Row]:
    pieces = _decoded(path)
    texts = cut(pieces, max_chars) if max_chars else ["".join(pieces)]
    for part, text in enumerate(texts):
        tally.cut += part == 1
        yield Row(shown(path), {"text": text})


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in chunks, without a byte-order mark."""
    decoder, offset, head = codecs.getincrementaldecoder("utf-8")(), 0, b""
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            head = head or chunk[:2]
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise ConfigError(_not_utf8(path, offset - pending + error.start, head)) from None
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(chunk)
            if not chunk:
                return


def _not_utf8(path: Path, at: int, head: bytes = b"") -> str:
    what = "is UTF-16, not UTF-8" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "is not UTF-8"
    return f"{shown(path)} {what} at byte {at}; convert it to UTF-8 or leave it out"


def _read_lines(path: Path, tally: Tally) -> Iterator[Row]:
    offset = number = 0
    # Bytes, text and fields of a long line are dropped as soon as they were used: together they take three times it.
    for line in _lines(path):
        number, start, offset = number + 1, offset, offset + len(line) + 1
        if not line or line.isspace():
            continue
        name = f"{shown(path)}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(_not_utf8(path, start + error.start, bytes(line[:2]))) from None
        del line
        # Each of several files put together may have brought its byte-order mark.
        row = _parse(text.removeprefix("\ufeff"), name)
        del text
        if row is None:
            tally.skip("row", "null", name)
        else:
            yield Row(name, row)
        del row


def _lines(path: Path) -> Iterator[bytes | bytearray]:
    """The lines of a file, however long, each looked at once. Raises ConfigError for one above MAX_LINE."""
    held, number = bytearray(), 1
    for chunk in _chunks(path):
        first, *others = chunk.split(b"\n")
        held += first
        if len(held) > MAX_LINE:
            rule = f"line {number} is longer than {MAX_LINE >> 20} MiB, and a line is one document"
            raise ConfigError(f"{shown(path)}: {rule}; put a line feed after each document")
        if others:
            # Only the caller holds a line meanwhile.
            whole, held, number = [held], bytearray(others.pop()), number + 1 + len(others)
            yield whole.pop()
            yield from others
    if held:
        yield held


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file in chunks."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else Path.open
    with opener(path, "rb") as file:
        if path.name.lower().endswith(".zst"):
            for chunk in _unzstd(file):
                yield from (chunk[i : i + _CHUNK] for i in range(0, len(chunk), _CHUNK))
        else:
            while chunk := file.read(_CHUNK):
                yield chunk


def _unzstd(file: Any) -> Iterator[bytes]:
    # Frame by frame: zstandard's own stream reader takes a truncated frame for the end of the file.
    decoder, frame = zstandard.ZstdDecompressor(max_window_size=1 << 31), None
    pending = file.read(_ZSTD_SLICE)
    while pending:
        frame = frame or decoder.decompressobj()
        if chunk := frame.decompress(pending):
            yield chunk
        pending = b""
        if frame.eof:
            pending, frame = frame.unused_data, None
        pending = pending or file.read(_ZSTD_SLICE)
    if frame is not None:
        raise EOFError("the last frame is not finished")


def _parse(line: str, name: str) -> dict[str, Any] | None:
    """The fields of a line; None for a line that is null."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON ({one_line(error)}); mend or remove that line") from None
    if row is not None and not isinstance(row, dict):
        raise ConfigError(f"{name} is a JSON {type(row).__name__}; it must be an object with a field `text`")
    return row


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # pyarrow takes half a second to load.
    from sparsemix.data.parquet import parquet_fields

    for number, fields in enumerate(parquet_fields(path, columns), 1):
        yield Row(f"{shown(path)}:{number}", fields)
