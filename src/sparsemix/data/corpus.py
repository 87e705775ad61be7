"""Text sources -> documents."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from sparsemix.config import ConfigError
from sparsemix.data.files import Row, check_found, find_files, read_rows
from sparsemix.data.hub import read_hub

SPLITS = ("train", "validation", "test")


class Document(NamedTuple):
    """One text and where it came from (`file`, or `file:line` inside a file of many documents)."""

    name: str
    text: str


def read_documents(sources: Sequence[str], on_progress: Callable[[int], None] | None = None) -> Iterator[Document]:
    """The documents of all sources in order; those that are only white space are left out.

    A source is one of
    - a file: .txt, .md, .py (one document each), .jsonl, .jsonl.gz, .jsonl.zst (one per line, field `text`) or
      .parquet (one per row, column `text`), UTF-8 throughout;
    - a folder (all such files below it, sorted, without hidden ones) or a glob of such files;
    - `stdlib`: the .py sources of this Python's standard library, without tests and encoding tables;
    - `hf:NAME:SPLIT` or `hf:NAME/CONFIG:SPLIT`, streamed from the Hugging Face Hub, column `text`. One segment is a
      name, three are org/name/config. Two are org/name if the Hub has such a dataset, else name/config, so both
      `hf:roneneldan/TinyStories:train` and `hf:wikitext/wikitext-2-raw-v1:train` say what they seem to.

    on_progress gets the UTF-8 bytes of text read so far. Raises ConfigError for a source that is missing, holds no
    supported file, cannot be read or decoded, or lacks `text`, and when all sources together hold no text."""
    files = {source: find_files(source) for source in sources if not source.startswith("hf:")}
    for source, found in files.items():
        check_found(source, found)
    num_bytes = num_documents = 0
    for source in sources:
        for row in read_hub(source) if source.startswith("hf:") else read_rows(files[source]):
            name, text = row.name, text_field(row)
            try:
                num_bytes += len(text.encode())
            except UnicodeEncodeError as error:
                rule = f"has a lone surrogate at character {error.start}"
                raise ConfigError(f"{name}: `text` {rule}; repair or remove that document") from None
            if on_progress:
                on_progress(num_bytes)
            if text.strip():
                num_documents += 1
                yield Document(name, text)
    if not num_documents:
        raise ConfigError(f"text={', '.join(sources)} holds no text: every document is empty; name other sources")


def text_field(row: Row, field: str = "text") -> str:
    """The string in a field of a row. Raises ConfigError if there is none."""
    name, fields = row
    if not isinstance(text := fields.get(field), str):
        found = f"`{field}` is {type(text).__name__}, not a string" if field in fields else f"no field `{field}`"
        known = ", ".join(fields) or "none"
        raise ConfigError(f"{name}: {found} (fields: {known}); rename the field that holds the text")
    return text


def mix64(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """SplitMix64's finaliser: a bijection of 64-bit words that spreads every bit over all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sha256(text: str) -> str:
    """The SHA-256 of the text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
