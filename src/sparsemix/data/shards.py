"""Documents -> memory-mapped token ids on disk -> batches in an order that resumes exactly."""

import contextlib
import functools
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from pydantic import model_validator
from tokenizers import Tokenizer

from sparsemix.config import Config, ConfigError
from sparsemix.data import corpus
from sparsemix.data.corpus import SPLITS, Document
from sparsemix.data.parts import Parts, scored_parts
from sparsemix.data.tokenizer import (
    end_of_text,
    id_dtype,
    load_tokenizer,
    num_ids,
    token_bytes,
    train_tokenizer,
    write_stream,
)
from sparsemix.data.windows import Batch, Stream

Progress = Callable[[str, int, int | None], None]
Splits = dict[str, list[str]]
Documents = Int64[np.ndarray, "D"]


class DataConfig(Config):
    """What text to train on and how it becomes token ids."""

    text: tuple[str, ...] = ("stdlib",)
    """Sources: files, folders, globs, `stdlib`, or hf:NAME:SPLIT (see `read_documents`)."""
    vocab_size: int = 1024
    """Tokens of the byte-level BPE trained on the training split, at most; unused with `tokenizer`."""
    tokenizer: str | None = None
    """A pretrained tokenizer instead: a tokenizer.json, its folder, or a name on the Hugging Face Hub."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by their hash, that makes up the validation split."""
    test_fraction: float = 0.05
    """Share of the documents, chosen by their hash, that makes up the test split."""
    fingerprint: str | None = None
    """Which text this must be: `prepare` fails if it finds another. Shown in the manifest after preparation."""

    @model_validator(mode="after")
    def _rules(self) -> "DataConfig":
        self.rule(bool(self.text) and all(self.text), "text", "must name at least one source, none of them empty")
        self.rule(self.vocab_size >= 257, "vocab_size", "must be at least 257: 256 bytes and the end of text")
        for name in ("validation_fraction", "test_fraction"):
            self.rule(0 < getattr(self, name) < 0.5, name, "must lie between 0 and 0.5, both excluded")
        return self


class Shards:
    """A prepared corpus: three splits, each one stream `EOT d1 EOT d2 ... EOT` in the order of the documents' hash."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.vocab_size: int = manifest["vocab_size"]
        self._tokens = {s: np.memmap(folder / f"{s}.bin", id_dtype(self.vocab_size), mode="r") for s in SPLITS}
        self._starts = {s: np.load(folder / f"{s}.starts.npy") for s in SPLITS}
        self._bytes = {s: np.load(folder / f"{s}.bytes.npy") for s in SPLITS}
        self._parts: dict[tuple[str, int, int | None], Parts] = {}
        self._streams = {s: Stream(self._tokens[s], self._starts[s]) for s in SPLITS}

    @classmethod
    def open(cls, folder: Path | str) -> "Shards":
        """The shards in a folder that `prepare` finished. Raises ConfigError if there are none or they are damaged."""
        folder = Path(folder)
        path = folder / "manifest.json"
        if not path.is_file():
            raise ConfigError(f"{folder} holds no finished shards; prepare the data in an empty or new folder")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            shards = cls(folder, json.loads(path.read_text(encoding="utf-8")))
            if all(len(shards._tokens[s]) == shards.manifest["tokens"][s] for s in SPLITS):
                return shards
        raise ConfigError(f"{folder} holds damaged shards; delete the folder and prepare it again")

    def tokens(self, split: str) -> np.ndarray:
        """The token ids of the split, (L,), uint16 or uint32, memory-mapped."""
        return self._tokens[split]

    def starts(self, split: str) -> Int64[np.ndarray, "starts"]:
        """Index of each document's first token (its EOT); the last entry is the index of the final EOT."""
        return self._starts[split]

    def bytes(self, split: str) -> Documents:
        """UTF-8 bytes of each document."""
        return self._bytes[split]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were written with."""
        return load_tokenizer(str(self.folder / "tokenizer.json"))

    def num_windows(self, seq_len: int) -> int:
        """Training windows in one epoch. Raises ConfigError if the training split is shorter than one."""
        num_tokens = len(self._tokens["train"])
        if num_tokens <= seq_len:
            raise ConfigError(f"seq_len={seq_len} must be below the training split's {num_tokens} tokens; add text")
        return (num_tokens - 1) // seq_len

    def batch(self, cursor: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        """Training samples cursor .. cursor + batch_size - 1 of the endless run that `seed` names.

        Sample i is window perm(i mod n) of the n windows, the permutation being that of epoch i // n; window w
        reads tokens[w T : w T + T + 1]. So `cursor`, the number of samples consumed, is all there is to resume.
        The fewer than T tokens after the last window are not trained on."""
        n = self.num_windows(seq_len)
        samples = cursor + np.arange(batch_size)
        windows = permute(samples % n, n, seed, samples // n)
        return self._streams["train"].rows(windows, seq_len, n * seq_len)

    def groups(self, split: str) -> Documents:
        """Which documents come from one source, by its number: each from its own."""
        return np.arange(len(self._bytes[split]))

    def parts(self, split: str, seq_len: int, max_tokens: int | None = None) -> Parts:
        """What of a split is scored in windows of seq_len tokens: all of it, or parts of about max_tokens tokens
        in all, drawn evenly from the whole split (see parts.py)."""
        key = (split, seq_len, max_tokens)
        if key not in self._parts:
            text = (self._tokens[split], self._starts[split], self._bytes[split])
            self._parts[key] = scored_parts(*text, self._lengths, seq_len, max_tokens)
        return self._parts[key]

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """Bytes that each id stands for: exact for byte-level tokenizers, else a guess that is scaled to the text."""
        return token_bytes(self.tokenizer(), self.vocab_size)

    def eval_batches(self, split: str, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """Windows over the `parts` of a split, their loss to be summed by `part_ids`."""
        return self._streams[split].eval_batches(batch_size, seq_len, self.parts(split, seq_len, max_tokens))


def permute(i: Int64[np.ndarray, "B"], n: int, seed: int, epoch: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
    """perm_{seed, epoch}(i), a permutation of 0 .. n-1 that is computed, never stored.

    A Feistel network over the smallest even number of bits that holds n; a value of n or more goes through it again
    (cycle walking), which keeps it a bijection on 0 .. n-1."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = corpus.mix64(corpus.mix64(np.full(len(i), seed % 2**64, np.uint64)) + epoch.astype(np.uint64))
    x, walking = i.astype(np.uint64), np.arange(len(i))
    while len(walking):
        left, right = x[walking] >> half, x[walking] & mask
        for step in range(8):
            left, right = right, left ^ (corpus.mix64(keys[walking] + (right << np.uint64(8)) + np.uint64(step)) & mask)
        x[walking] = left << half | right
        walking = walking[x[walking] >= n]
    return x.astype(np.int64)


def prepare(config: DataConfig, folder: Path, progress: Progress | None = None) -> Shards:
    """The shards of `config` in `folder`, written there unless they already are.

    The folder appears whole or not at all. Finished shards of the same settings are reused without reading the text if
    `config.fingerprint` names them, or if no source file has changed since (size, time); they need no sources.
    progress gets (stage, done, total). The corpus is held in memory. Raises ConfigError for unreadable text, a folder
    that holds something else, and a text that is not the one that `config.fingerprint` or the shards name."""
    report = progress or (lambda stage, done, total: None)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _reuse(config, folder, report)
    stamp = _stamp(config.text)
    documents, dropped, cut = _collect(config, report)
    mark = corpus.fingerprint(documents)
    if config.fingerprint not in (None, mark):
        raise ConfigError(f"fingerprint={config.fingerprint}: the text is now {mark}; restore it, or drop the setting")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        facts = {"fingerprint": mark, "stamp": stamp, "duplicates_dropped": dropped, "cut_into_pieces": cut}
        _write(config, temporary, _split(documents, config), facts, report)
        temporary.rename(folder)
    except OSError as error:
        # Another process may have prepared the same folder meanwhile.
        if (folder / "manifest.json").is_file():
            return _reuse(config, folder, report)
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Shards.open(folder)


def _reuse(config: DataConfig, folder: Path, report: Progress) -> Shards:
    shards = Shards.open(folder)
    there, asked = shards.manifest["settings"], config.model_dump(mode="json", exclude={"fingerprint"})
    if differ := [f"{k}={there.get(k)} there, {asked[k]} asked" for k in asked if there.get(k) != asked[k]]:
        raise ConfigError(f"{folder} holds shards of other settings: {'; '.join(differ)}; choose another folder")
    held = wanted = shards.manifest["fingerprint"]
    if config.fingerprint is not None:
        wanted = config.fingerprint
    elif _stamp(config.text) not in (None, shards.manifest["stamp"]):
        wanted = corpus.fingerprint(_collect(config, report)[0])
    if wanted != held:
        raise ConfigError(f"{folder} holds shards of the text {held}, not {wanted}; delete it or choose another folder")
    return shards


def _stamp(sources: Sequence[str]) -> str | None:
    """Changes when a source file does, judged by path, size and time; None if a source is not on this disk."""
    lines: list[str] = []
    for source in (s for s in sources if not s.startswith("hf:")):
        if not (files := corpus.find_files(source)):
            return None
        lines += [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return corpus.sha256("\n".join(lines))


def _collect(config: DataConfig, report: Progress) -> tuple[list[Document], int, bool]:
    """(documents, duplicates dropped, whether fewer than three were cut into pieces)."""
    documents, dropped = corpus.deduplicate(corpus.read_documents(config.text, lambda n: report("reading", n, None)))
    if cut := len(documents) < len(SPLITS):
        size = sum(len(d.text) for d in documents) / 200
        documents, more = corpus.deduplicate(piece for d in documents for piece in _pieces(d, size))
        dropped += more
    if len(documents) < len(SPLITS):
        rule = f"holds {len(documents)} different paragraphs or lines, but each of the three splits needs one"
        raise ConfigError(f"text={', '.join(config.text)} {rule}; add text")
    return documents, dropped, cut


def _pieces(document: Document, size: float) -> Iterator[Document]:
    """Whole paragraphs (whole lines if there are fewer than three paragraphs), joined to at least `size` characters."""
    units = re.split(r"(?<=\n\n)(?!\n)", document.text)
    units = units if len(units) >= len(SPLITS) else document.text.splitlines(keepends=True)
    piece = ""
    for unit in units:
        piece += unit
        if piece.strip() and len(piece) >= size:
            yield Document(document.name, piece)
            piece = ""
    if piece.strip():
        yield Document(document.name, piece)


def _split(documents: list[Document], config: DataConfig) -> Splits:
    """The texts of each split in the order of their hash. A split left empty gets the largest one's first text."""
    splits: Splits = {split: [] for split in SPLITS}
    for text in sorted((d.text for d in documents), key=corpus.sha256):
        splits[corpus.split_of(text, config.validation_fraction, config.test_fraction)].append(text)
    for split in SPLITS:
        if not splits[split]:
            splits[split].append(max(splits.values(), key=len).pop(0))
    return splits


def _write(config: DataConfig, folder: Path, splits: Splits, facts: dict[str, Any], report: Progress) -> None:
    name = config.tokenizer
    report("reading the tokenizer" if name else "training the tokenizer", 0, None)
    tokenizer = load_tokenizer(name) if name else train_tokenizer(splits["train"], config.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = num_ids(tokenizer)
    num_documents = {split: len(texts) for split, texts in splits.items()}
    sizes = {split: np.array([len(text.encode()) for text in texts], np.int64) for split, texts in splits.items()}
    num_bytes = {split: int(n.sum()) for split, n in sizes.items()}
    num_tokens: dict[str, int] = {}
    for split, texts in splits.items():
        report("tokenizing", sum(num_documents[s] for s in num_tokens), sum(num_documents.values()))
        starts = write_stream(tokenizer, texts, folder / f"{split}.bin")
        num_tokens[split] = int(starts[-1]) + 1
        np.save(folder / f"{split}.starts.npy", starts)
        np.save(folder / f"{split}.bytes.npy", sizes[split])
    manifest = {
        "sources": list(config.text),
        **facts,
        "documents": num_documents,
        "bytes_total": sum(num_bytes.values()),
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": sum(num_bytes.values()) / sum(num_tokens.values()),
        "vocab_size": vocab_size,
        "tokenizer": name or f"byte-level BPE of {vocab_size} tokens, trained on the training split",
        "end_of_text": end_of_text(tokenizer),
        "settings": config.model_dump(mode="json", exclude={"fingerprint"}),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
