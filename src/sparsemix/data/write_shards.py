"""Documents of a spool -> tokenizer, token streams and manifest in a folder."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer

from sparsemix.data.contamination import TokenFile, contamination, warning
from sparsemix.data.shards import DataConfig
from sparsemix.data.spool import Spool
from sparsemix.data.token_stream import byte_pieces, write_stream
from sparsemix.data.tokenizer import end_of_text, id_dtype, load_tokenizer, num_ids, train_tokenizer
from sparsemix.provenance import versions

Progress = Callable[[str, int, int | None], None]
# A tokenizer's words are settled long before this much text, and learning them takes longer than encoding does.
_TOKENIZER_BYTES = 3 << 22


class Pieces(NamedTuple):
    """What a split holds, in order: of each document of a spool the bytes from first to before last; its group."""

    documents: Int64[np.ndarray, "P"]
    first: Int64[np.ndarray, "P"]
    last: Int64[np.ndarray, "P"]
    groups: Int64[np.ndarray, "P"]

    def texts(self, spool: Spool) -> Iterator[bytes]:
        """Their UTF-8 bytes."""
        for document, first, last in zip(self.documents.tolist(), self.first.tolist(), self.last.tolist(), strict=True):
            yield spool.raw(document, first, last)


def write_shards(
    config: DataConfig,
    folder: Path,
    spool: Spool,
    splits: Mapping[str, Pieces],
    facts: dict[str, Any],
    report: Progress,
) -> None:
    """Everything that `Shards` reads, the manifest last; `facts` are put into it."""
    sizes = {split: pieces.last - pieces.first for split, pieces in splits.items()}
    num_bytes = {split: int(n.sum()) for split, n in sizes.items()}
    tokenizer, said = _tokenizer(config, splits["train"], num_bytes["train"], spool, report)
    tokenizer.save(str(folder / "tokenizer.json"))
    num_tokens: dict[str, int] = {}
    before, total = 0, sum(num_bytes.values())
    report("tokenizing", 0, total)
    for split, pieces in splits.items():
        written = functools.partial(_further, report, before, total)
        starts = write_stream(tokenizer, pieces.texts(spool), folder / f"{split}.bin", written)
        before += num_bytes[split]
        num_tokens[split] = int(starts[-1]) + 1
        np.save(folder / f"{split}.starts.npy", starts)
        np.save(folder / f"{split}.bytes.npy", sizes[split])
        np.save(folder / f"{split}.groups.npy", pieces.groups)
    dtype, end = id_dtype(num_ids(tokenizer)), end_of_text(tokenizer)
    ids = {split: TokenFile(folder / f"{split}.bin", dtype) for split in splits}
    measured = contamination(ids, end, lambda n: report("looking for held-out text in train", n, num_tokens["train"]))
    manifest = {
        "sources": list(config.text),
        **facts,
        "warnings": [*facts["warnings"], *warning(measured)],
        "contamination": measured,
        "documents": {split: len(pieces.documents) for split, pieces in splits.items()},
        "groups": {split: len(np.unique(pieces.groups)) for split, pieces in splits.items()},
        "bytes_total": total,
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": total / sum(num_tokens.values()),
        "vocab_size": num_ids(tokenizer),
        "tokenizer": said,
        "end_of_text": end,
        "sealed": True,
        "settings": config.model_dump(mode="json", exclude={"fingerprint"}),
        "versions": versions(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _further(report: Progress, before: int, total: int, done: int) -> None:
    report("tokenizing", before + done, total)


def _tokenizer(
    config: DataConfig, train: Pieces, num_bytes: int, spool: Spool, report: Progress
) -> tuple[Tokenizer, str]:
    """(the tokenizer, what it is in words): the named one, or one trained on the first 12 MiB of the training split,
    whose order is that of hashes: a random sample of a larger one."""
    if config.tokenizer:
        report("reading the tokenizer", 0, None)
        return load_tokenizer(config.tokenizer), config.tokenizer
    most = min(num_bytes, _TOKENIZER_BYTES)

    def sample() -> Iterator[str]:
        held = 0
        for text in train.texts(spool):
            report("training the tokenizer", held, most)
            if held >= _TOKENIZER_BYTES:
                return
            piece = next(byte_pieces(text, _TOKENIZER_BYTES - held)) if len(text) > _TOKENIZER_BYTES - held else text
            held += len(text)
            yield piece.decode()

    tokenizer = train_tokenizer(sample(), config.vocab_size)
    of = "the training split" if num_bytes <= _TOKENIZER_BYTES else f"{most / 1e6:.1f} MB of the training split"
    return tokenizer, f"byte-level BPE of {num_ids(tokenizer)} tokens, trained on {of}"
