"""Text sources -> documents, near-duplicates dropped, split by hash."""

import functools
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from jaxtyping import UInt64

from sparsemix.config import ConfigError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SPLITS = ("train", "validation", "test")
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
_CHUNK = 1 << 20
_SHINGLE, _BANDS, _ROWS, _SAME = 5, 16, 4, 0.8


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
        _check_found(source, found)
    num_bytes = num_documents = 0
    for source in sources:
        for name, text in _read_hub(source) if source.startswith("hf:") else _read_files(files[source]):
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
        raise ConfigError(f"{source} is no glob ({_line(error)}); mend the pattern") from None
    return sorted(p for p in matches if p.is_file() and _supported(p))


def _check_found(source: str, found: list[Path]) -> None:
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


def _read_files(paths: list[Path]) -> Iterator[Document]:
    for path in paths:
        try:
            if path.name.lower().endswith(".parquet"):
                yield from _read_parquet(path)
            elif ".jsonl" in path.name.lower():
                yield from _read_lines(path)
            else:
                yield Document(str(path), _decode(path.read_bytes(), path, 0))
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{path} is truncated or corrupt ({_line(error)}); fetch it again") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({_line(error)}); check the file and its permissions") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ConfigError(f"{path} is not UTF-8 at byte {at}; convert it to UTF-8 or leave it out") from None


def _read_lines(path: Path) -> Iterator[Document]:
    offset, tail, number = 0, b"", 0
    for chunk in _chunks(path):
        # A last line without a line feed comes out with the empty chunk that ends the file.
        *lines, tail = (tail + chunk).split(b"\n") if chunk else (tail, b"")
        for line in lines:
            number += 1
            if line.strip():
                name = f"{path}:{number}"
                yield Document(name, _text_field(_parse(_decode(line, path, offset), name), name))
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
        raise ConfigError(f"{name} is not JSON ({_line(error)}); mend or remove that line") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{name} is a JSON {type(row).__name__}; it must be an object with a field `text`")
    return row


def _text_field(row: dict[str, Any], name: str) -> str:
    if not isinstance(text := row.get("text"), str):
        found = f"`text` is {type(text).__name__}, not a string" if "text" in row else "no field `text`"
        raise ConfigError(f"{name}: {found} (fields: {', '.join(row) or 'none'}); rename the field that holds the text")
    return text


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # Without the column the rows carry every field, so that the error can name them.
            batches = file.iter_batches(columns=["text"] if "text" in names else None)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield Document(f"{path}:{number}", _text_field(row, f"{path}:{number}"))
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is truncated or corrupt parquet ({_line(error)}); fetch it again") from None


def _read_hub(source: str) -> Iterator[Document]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, split = source.removeprefix("hf:").rpartition(":")
    parts = name.split("/")
    if not split or not all(parts) or len(parts) > 3:
        raise ConfigError(f"{source} must look like hf:NAME:SPLIT, hf:ORG/NAME:SPLIT or hf:ORG/NAME/CONFIG:SPLIT")
    load: Any = functools.partial(load_dataset, split=split, streaming=True)
    # The Hub, the network and foreign file formats can fail in any way, and each is the source's failure.
    try:
        try:
            rows = load("/".join(parts[:2]), *parts[2:])
        except DatasetNotFoundError:
            if len(parts) != 2:
                raise
            rows = load(*parts)
        for number, row in enumerate(rows, 1):
            yield Document(f"{source}:{number}", _text_field(row, f"{source}:{number}"))
    except ConfigError:
        raise
    except Exception as error:
        way_out = "check the name, the split and the network, or use local files"
        raise ConfigError(f"{source} cannot be streamed ({_line(error)}); {way_out}") from None


def mix64(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """SplitMix64's finaliser: a bijection of 64-bit words that spreads every bit over all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _signature(text: str, hash_word: Callable[[str], int], factors: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """MinHash of the set of 5-word shingles, (64,); a text of fewer words is one shingle."""
    words = text.split()
    ids = np.zeros(max(len(words), _SHINGLE), np.uint64)
    ids[: len(words)] = [hash_word(word) for word in words]
    shingles = np.zeros(len(ids) - _SHINGLE + 1, np.uint64)
    for k in range(_SHINGLE):
        shingles = mix64(shingles + ids[k : k + len(shingles)])
    signature = np.full(len(factors), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), 4096):
        hashed = shingles[start : start + 4096, None] * factors + offsets
        signature = np.minimum(signature, hashed.min(axis=0))
    return signature


def deduplicate(documents: Iterable[Document]) -> tuple[list[Document], int]:
    """(the documents without exact and near duplicates, the number dropped); the first of each group stays.

    Near: MinHash over 5-word shingles finds pairs (16 bands of 4) and estimates their Jaccard similarity; 0.8 and
    above is a duplicate. White space does not count. Holds the kept documents in memory."""
    seeds = mix64(np.arange(1, 2 * _BANDS * _ROWS + 1, dtype=np.uint64))
    factors, offsets = seeds[::2] | np.uint64(1), seeds[1::2]
    hash_word, buckets = functools.cache(_hash_word), {}
    kept: list[Document] = []
    signatures, dropped = [], 0
    for document in documents:
        signature = _signature(document.text, hash_word, factors, offsets)
        keys = [(band, row.tobytes()) for band, row in enumerate(signature.reshape(_BANDS, _ROWS))]
        near = sorted({i for key in keys for i in buckets.get(key, ())})
        if near and (np.stack([signatures[i] for i in near]) == signature).mean(axis=1).max() >= _SAME:
            dropped += 1
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        kept.append(document)
        signatures.append(signature)
    return kept, dropped


def sha256(text: str) -> str:
    """The SHA-256 of the text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over the sorted SHA-256 of the texts: names the corpus whatever the order of its documents."""
    return hashlib.sha256("".join(sorted(sha256(d.text) for d in documents)).encode()).hexdigest()


def split_of(text: str, validation_fraction: float, test_fraction: float) -> str:
    """'train', 'validation' or 'test', decided by the SHA-256 of the text alone.

    Test comes first, so another validation_fraction moves no document into or out of the test split."""
    u = int(sha256(text)[:16], 16) / 2**64
    return "test" if u < test_fraction else "validation" if u < test_fraction + validation_fraction else "train"
