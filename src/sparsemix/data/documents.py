"""Text sources -> documents, one at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsemix.config import ConfigError
from sparsemix.data.files import check_found, find_files, shown
from sparsemix.data.hub import read_hub
from sparsemix.data.rows import Row, cut, read_rows
from sparsemix.data.tally import Tally

MAX_CHARS = 1 << 20
"""Characters of a document: a longer text is cut. Tokenizing takes some 150 bytes of memory for each."""


class Document(NamedTuple):
    """One text and where it came from (`file`, or `file:line` inside a file of many documents)."""

    name: str
    text: str


def read_documents(
    sources: Sequence[str],
    on_progress: Callable[[int], None] | None = None,
    text_as: Sequence[str] = (),
    tally: Tally | None = None,
) -> Iterator[Document]:
    """The documents of all sources in order; those that are only white space or null are left out.

    A source is one of
    - a file: .txt, .md, .py (one document each), .jsonl, .jsonl.gz, .jsonl.zst (one per line, field `text`) or
      .parquet (one per row, column `text`), UTF-8 throughout, with or without a byte-order mark;
    - a folder (all such files below it, sorted, without hidden ones, linked folders too) or a glob of such files;
    - `stdlib`: the .py sources of this Python's standard library, without tests and encoding tables;
    - `hf:NAME:SPLIT` or `hf:NAME/CONFIG:SPLIT`, streamed from the Hugging Face Hub, column `text`. One segment is a
      name, three are org/name/config. Two are org/name if the Hub has such a dataset, else name/config, so both
      `hf:roneneldan/TinyStories:train` and `hf:wikitext/wikitext-2-raw-v1:train` say what they seem to.

    `text_as` are suffixes of further files that are read as .txt is; `.` stands for names without a suffix. A document
    of more than MAX_CHARS characters comes in parts of one name. One document is in memory at a time.

    on_progress gets the UTF-8 bytes of text read so far; `tally` gets what was read and what was skipped, and is
    complete when the iterator ends. Raises ConfigError for a source that is missing, holds no supported file, cannot be
    read or decoded, or lacks `text`, and when all sources together hold no text."""
    tally = tally if tally is not None else Tally()
    files: dict[str, list[Path]] = {}
    for source in dict.fromkeys(s for s in sources if not s.startswith("hf:")):
        seen = Tally()
        files[source] = find_files(source, text_as, seen)
        check_found(source, files[source], text_as, seen)
        tally.add(seen)
    tally.found += sum(len(files.get(source, ())) for source in sources)
    for source in sources:
        for row in _rows(source, files, tally):
            if (text := _text(row, tally)) is None:
                continue
            for number, part in enumerate([text] if len(text) <= MAX_CHARS else cut([text], MAX_CHARS)):
                tally.cut += number == 1
                tally.bytes += len(part.encode())
                if on_progress:
                    on_progress(tally.bytes)
                if part.strip():
                    tally.documents += 1
                    yield Document(row.name, part)
                else:
                    tally.skip("document", "only white space", row.name)
    if not tally.documents:
        names = ", ".join(shown(source) for source in sources)
        raise ConfigError(f"text={names} holds no text: every document is empty ({tally.skips()}); name other sources")


def _rows(source: str, files: Mapping[str, Sequence[Path]], tally: Tally) -> Iterator[Row]:
    if source.startswith("hf:"):
        tally.data_sets += 1
        yield from read_hub(source)
    else:
        yield from read_rows(files[source], max_chars=MAX_CHARS, tally=tally)


def _text(row: Row, tally: Tally) -> str | None:
    """The text of a row; None if it is null. Raises ConfigError if there is none or it cannot be written as UTF-8."""
    if "text" in row.fields and row.fields["text"] is None:
        tally.skip("row", "`text` is null", row.name)
        return None
    text = text_field(row)
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        rule = f"has a lone surrogate at character {error.start}"
        raise ConfigError(f"{row.name}: `text` {rule}; repair or remove that document") from None
    return text


def text_field(row: Row, field: str = "text") -> str:
    """The string in a field of a row. Raises ConfigError if there is none."""
    name, fields = row
    text = fields.get(field)
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name}: `{field}` is not UTF-8 at its byte {error.start}; convert it or leave the row out"
            ) from None
    if not isinstance(text, str):
        found = f"`{field}` is {type(text).__name__}, not a string" if field in fields else f"no field `{field}`"
        known = ", ".join(fields) or "none"
        raise ConfigError(f"{name}: {found} (fields: {known}); rename the field that holds the text")
    return text
