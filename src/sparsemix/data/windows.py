"""A stream of token ids -> windows of seq_len tokens, each token the target exactly once."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor


class Batch(NamedTuple):
    """One batch. positions count from 0 in each row; doc_ids are indices into the split's documents.

    A document begins with its end-of-text token and is scored up to the end-of-text token after it: the loss at
    position p belongs to document doc_ids[p]. valid=None: all real. Where not valid, the target is -100."""

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    positions: Int64[Tensor, "B T"]
    doc_ids: Int64[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None = None


class Stream(NamedTuple):
    """`EOT d1 EOT d2 ... EOT` as ids, (L,); and the index of each document's first token, then of the final EOT."""

    tokens: np.ndarray
    starts: Int64[np.ndarray, "starts"]

    def first(self, max_tokens: int) -> "Stream":
        """The first max_tokens scored tokens, the document that goes beyond them cut."""
        total = min(max_tokens, int(self.starts[-1]))
        starts = np.append(self.starts[self.starts < total], total)
        return Stream(self.tokens[: total + 1], starts)

    def covered(self, max_tokens: int | None) -> int:
        """How many first whole documents fit max_tokens: all if None, at least one."""
        ends = self.starts[1:]
        return len(ends) if max_tokens is None else max(1, int(np.searchsorted(ends, max_tokens, side="right")))

    def eval_batches(self, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """Consecutive windows over the first whole documents that fit max_tokens (all if None, at least one).

        Every token of them, their ends included, is the target exactly once. The last row is padded with its last
        token, the last batch may have fewer rows."""
        total = int(self.starts[self.covered(max_tokens)])
        windows = np.arange(-(-total // seq_len))
        for first in range(0, len(windows), batch_size):
            yield self.rows(windows[first : first + batch_size], seq_len, total)

    def rows(self, windows: np.ndarray, seq_len: int, total: int) -> Batch:
        """The windows of the first `total` scored positions."""
        offsets = np.arange(seq_len)
        at = windows[:, None] * seq_len + offsets  # (B, T)
        valid = at < total
        at = np.minimum(at, total - 1)
        tokens, starts = self.tokens, self.starts
        return Batch(
            tokens=torch.from_numpy(tokens[at].astype(np.int64)),
            targets=torch.from_numpy(np.where(valid, tokens[at + 1].astype(np.int64), -100)),
            positions=torch.from_numpy(np.tile(offsets, (len(windows), 1))),
            doc_ids=torch.from_numpy(np.searchsorted(starts, at, side="right") - 1),
            valid=None if valid.all() else torch.from_numpy(valid),
        )
