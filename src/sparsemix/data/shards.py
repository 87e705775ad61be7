"""Memory-mapped token ids on disk -> batches in an order that resumes exactly."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64
from pydantic import model_serializer, model_validator
from tokenizers import Tokenizer

from sparsemix.config import Config, ConfigError, without_later
from sparsemix.data import corpus
from sparsemix.data.corpus import SPLITS
from sparsemix.data.files import check_text_as
from sparsemix.data.parts import Parts, scored_parts
from sparsemix.data.tokenizer import id_dtype, load_tokenizer, token_bytes
from sparsemix.data.windows import Batch, Stream
from sparsemix.durable import SEAL, damage
from sparsemix.inputs import load_json

Documents = Int64[np.ndarray, "D"]


_ARRAYS = ("starts", "bytes")
_sound: set[tuple[Any, ...]] = set()


class DataConfig(Config):
    """What text to train on and how it becomes token ids."""

    text: tuple[str, ...] = ("stdlib",)
    """Sources: files, folders, globs, `stdlib`, or hf:NAME:SPLIT (see `read_documents`)."""
    text_as: tuple[str, ...] = ()
    """Suffixes of further files that are read as plain text, such as .asc; `.` for names without a suffix."""
    vocab_size: int = 1024
    """Tokens of the byte-level BPE trained on the training split, at most; unused with `tokenizer`."""
    tokenizer: str | None = None
    """A pretrained tokenizer instead: a tokenizer.json, its folder, or a name on the Hugging Face Hub."""
    validation_fraction: float = 0.05
    """Share of the text that makes up the validation split (see `split`)."""
    test_fraction: float = 0.05
    """Share of the text that makes up the test split."""
    split: Literal["hash", "folder", "file", "time"] = "hash"
    """What decides which split a document goes to: its hash, near-duplicates together (`data/split.py` has the rule);
    or all of a file, or all below one folder of a source, stay together; or the newest files are test."""
    fingerprint: str | None = None
    """Which text this must be: `prepare` fails if it finds another. Shown in the manifest after preparation."""

    @model_validator(mode="after")
    def _rules(self) -> "DataConfig":
        self.rule(bool(self.text) and all(self.text), "text", "must name at least one source, none of them empty")
        self.rule((broken := check_text_as(self.text_as)) is None, "text_as", broken or "")
        self.rule(self.vocab_size >= 257, "vocab_size", "must be at least 257: 256 bytes and the end of text")
        for name in ("validation_fraction", "test_fraction"):
            self.rule(0 < getattr(self, name) < 0.5, name, "must lie between 0 and 0.5, both excluded")
        return self

    @model_serializer(mode="wrap")
    def _named(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return without_later(self, dump(self), ("split", "text_as"))


class Shards:
    """A prepared corpus: three splits, each one stream `EOT d1 EOT d2 ... EOT` in the order of the documents' hash."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.vocab_size: int = manifest["vocab_size"]
        self._tokens = {s: np.memmap(folder / f"{s}.bin", id_dtype(self.vocab_size), mode="r") for s in SPLITS}
        self._starts, self._bytes = ({s: np.load(folder / f"{s}.{name}.npy") for s in SPLITS} for name in _ARRAYS)
        # Shards of earlier versions have no groups: there each document is its own.
        self._groups = {
            s: np.load(path) if (path := folder / f"{s}.groups.npy").is_file() else np.arange(len(self._bytes[s]))
            for s in SPLITS
        }
        self._parts: dict[tuple[str, int, int | None], Parts] = {}
        self._streams = {s: Stream(self._tokens[s], self._starts[s]) for s in SPLITS}

    @classmethod
    def open(cls, folder: Path | str) -> "Shards":
        """The shards in a folder that `prepare` finished. Raises ConfigError if there are none or they are damaged.

        Every file is compared with its SHA-256, once in a process unless a file changes (about a second a GB). Shards
        of earlier versions have none; their sizes and ids are checked."""
        folder = Path(folder)
        path = folder / "manifest.json"
        if not path.is_file():
            raise ConfigError(f"{folder} holds no finished shards; prepare the data in an empty or new folder")
        try:
            wrong = _altered(folder)
            if wrong is None:
                shards = cls(folder, load_json(path))
                wrong = shards._wrong()
                if wrong is None:
                    return shards
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            wrong = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{folder} holds damaged shards ({wrong}); delete the folder and prepare it again")

    def _wrong(self) -> str | None:
        """What does not fit together, in words."""
        for s in SPLITS:
            starts, count = self._starts[s], len(self._bytes[s])
            if len(self._tokens[s]) != self.manifest["tokens"][s]:
                return f"{s}.bin has {len(self._tokens[s])} of {self.manifest['tokens'][s]} tokens"
            if {len(starts) - 1, len(self._groups[s]), self.manifest["documents"][s]} != {count} or not count:
                return f"the arrays of {s} are not of one length"
            if starts[0] or starts[-1] != len(self._tokens[s]) - 1 or (np.diff(starts) <= 0).any():
                return f"{s}.starts.npy is not in order"
            if not self._sealed and max(int(part.max()) for part in _blocks(self._tokens[s])) >= self.vocab_size:
                return f"{s}.bin has an id beyond the vocabulary"
        return None

    @property
    def _sealed(self) -> bool:
        return bool(self.manifest.get("sealed"))

    def tokens(self, split: str) -> np.ndarray:
        """The token ids of the split, (L,), uint16 or uint32, memory-mapped."""
        return self._tokens[split]

    def starts(self, split: str) -> Int64[np.ndarray, "starts"]:
        """Index of each document's first token (its EOT); the last entry is the index of the final EOT."""
        return self._starts[split]

    def bytes(self, split: str) -> Documents:
        """UTF-8 bytes of each document."""
        return self._bytes[split]

    def groups(self, split: str) -> Documents:
        """For each document the number of what it came from, its group: parts of one text, near-duplicates (or what
        `DataConfig.split` keeps together) have the same, in every split."""
        return self._groups[split]

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


def _altered(folder: Path) -> str | None:
    """What is not as it was written, by the checksums; shards of earlier versions have none."""
    manifest = load_json(folder / "manifest.json")
    if not manifest.get("sealed") and not (folder / SEAL).is_file():
        return None
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    now = (str(folder.resolve()), *((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats))
    if now not in _sound:
        if (wrong := damage(folder)) is not None:
            return wrong
        _sound.add(now)
    return None


def _blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[start : start + (1 << 22)] for start in range(0, len(tokens), 1 << 22))
