"""A stream of token ids -> windows of seq_len tokens, each token the target exactly once."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sparsemix.data.parts import Parts


class Batch(NamedTuple):
    """One batch. positions count from 0 in each row; doc_ids say which tokens see each other: indices into the split's
    documents, or, where parts of documents are scored, into their unbroken stretches.

    A document begins with its end-of-text token and is scored up to the end-of-text token after it: the loss at
    position p belongs to document doc_ids[p], or to part part_ids[p] where parts are scored. valid=None: all real.
    Where not valid, the target is -100."""

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    positions: Int64[Tensor, "B T"]
    doc_ids: Int64[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None = None
    part_ids: Int64[Tensor, "B T"] | None = None


class Stream(NamedTuple):
    """`EOT d1 EOT d2 ... EOT` as ids, (L,); and the index of each document's first token, then of the final EOT."""

    tokens: np.ndarray
    starts: Int64[np.ndarray, "starts"]

    def first(self, max_tokens: int) -> "Stream":
        """The first max_tokens scored tokens, the document that goes beyond them cut."""
        total = min(max_tokens, int(self.starts[-1]))
        starts = np.append(self.starts[self.starts < total], total)
        return Stream(self.tokens[: total + 1], starts)

    def eval_batches(self, batch_size: int, seq_len: int, parts: Parts | None = None) -> Iterator[Batch]:
        """Consecutive windows over all documents, or over `parts` of them one after the other.

        Every token of them, the documents' ends included, is the target exactly once. The last row is padded with its
        last token, the last batch may have fewer rows."""
        total = int(self.starts[-1]) if parts is None else parts.tokens
        windows = np.arange(-(-total // seq_len))
        for first in range(0, len(windows), batch_size):
            rows = windows[first : first + batch_size]
            yield self.rows(rows, seq_len, total) if parts is None else self.part_rows(rows, seq_len, parts)

    def part_rows(self, windows: np.ndarray, seq_len: int, parts: Parts) -> Batch:
        """The windows of the parts' targets, laid one after the other."""
        begins = np.cumsum(parts.ends - parts.starts) - (parts.ends - parts.starts)
        at, valid = _places(windows, seq_len, parts.tokens)
        part = np.searchsorted(begins, at, side="right") - 1
        # Parts that follow each other in one document are one stretch: what is scored later sees what was before it.
        broken = (parts.starts[1:] != parts.ends[:-1]) | (parts.docs[1:] != parts.docs[:-1])
        stretch = np.cumsum(np.append(0, broken))
        return self._batch(parts.starts[part] + at - begins[part], valid, stretch[part], part)

    def rows(self, windows: np.ndarray, seq_len: int, total: int) -> Batch:
        """The windows of the first `total` scored positions."""
        at, valid = _places(windows, seq_len, total)
        return self._batch(at, valid, np.searchsorted(self.starts, at, side="right") - 1)

    def _batch(self, at: np.ndarray, valid: np.ndarray, docs: np.ndarray, part: np.ndarray | None = None) -> Batch:
        tokens = self.tokens
        return Batch(
            tokens=torch.from_numpy(tokens[at].astype(np.int64)),
            targets=torch.from_numpy(np.where(valid, tokens[at + 1].astype(np.int64), -100)),
            positions=torch.from_numpy(np.tile(np.arange(at.shape[1]), (len(at), 1))),
            doc_ids=torch.from_numpy(docs),
            valid=None if valid.all() else torch.from_numpy(valid),
            part_ids=None if part is None else torch.from_numpy(part),
        )


def _places(windows: np.ndarray, seq_len: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """(which of `total` places each token of the windows has, (B, T); whether it is one: the last is repeated)."""
    at = windows[:, None] * seq_len + np.arange(seq_len)
    return np.minimum(at, total - 1), at < total
