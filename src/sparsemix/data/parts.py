"""What of a split is scored, and in which parts: long documents neither eat the budget nor decide alone."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sparsemix.data.corpus import mix64


class Parts(NamedTuple):
    """What of a split is scored: part p is the targets of the tokens starts_p .. ends_p - 1, of bytes_p UTF-8 bytes, of
    document docs_p. In the order of the text."""

    starts: Int64[np.ndarray, " P"]
    ends: Int64[np.ndarray, " P"]
    docs: Int64[np.ndarray, " P"]
    bytes: Int64[np.ndarray, " P"]

    @property
    def tokens(self) -> int:
        """Targets in all."""
        return int((self.ends - self.starts).sum())

    def with_context(self, tokens: np.ndarray, size: int, eot: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, scored): a stream that begins with the end of text and holds every part's targets, which `scored`
        marks, after the `size` tokens before them, or after as many as their document has."""
        ids, scored = [], []
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            context = tokens[max(0, start + 1 - size) : start + 1]
            # What lies before the document's own end-of-text token is another document's.
            context = context[max(np.flatnonzero(context == eot), default=0) :]
            if context[0] != eot:
                context = np.append(eot, context)
            ids += [context, tokens[start + 1 : end + 1]]
            scored += [np.zeros(len(context), bool), np.ones(end - start, bool)]
        return np.concatenate(ids).astype(np.int64), np.concatenate(scored)


# A part of a document that is scored on its own has at most this many tokens.
LONGEST_PART = 2048
# Where not all is scored, parts are small enough for so many of them, so that no single document decides.
FEWEST_PARTS = 16


def part_bounds(
    starts: Int64[np.ndarray, "starts"], seq_len: int, max_tokens: int | None
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
    """(starts, ends, docs) of the parts into which documents are cut to be scored, all of them.

    A part is whole windows of seq_len tokens, as many as fit 2048 tokens and a sixteenth of what is scored (one at
    least), the last of a document half to one and a half of that; a shorter document is one part. A split of fewer
    tokens than two parts is cut in two."""
    total = int(starts[-1])
    scored = total if max_tokens is None else min(max_tokens, total)
    size = seq_len * max(1, min(LONGEST_PART, scored // FEWEST_PARTS) // seq_len)
    size = min(size, max(8, total // 2))
    counts = np.maximum(1, (np.diff(starts) + size // 2) // size)
    docs = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(docs)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[docs] + within * size
    return first, np.append(first[1:], total), docs


def chosen(lengths: Int64[np.ndarray, " P"], max_tokens: int | None) -> Int64[np.ndarray, "chosen"]:
    """The parts that are scored, in order: all if they fit max_tokens, else as many as fit of a fixed random order (one
    at least), so that every token of the split is as likely to be scored as any other."""
    if max_tokens is None or lengths.sum() <= max_tokens:
        return np.arange(len(lengths))
    order = np.argsort(mix64(np.arange(1, len(lengths) + 1, dtype=np.uint64)), kind="stable")
    fit = int(np.searchsorted(np.cumsum(lengths[order]), max_tokens, side="right"))
    return np.sort(order[: max(1, fit)])


def scored_parts(
    tokens: np.ndarray,
    doc_starts: Int64[np.ndarray, "starts"],
    doc_bytes: Int64[np.ndarray, " D"],
    lengths: Int64[np.ndarray, " V"],
    seq_len: int,
    max_tokens: int | None,
) -> Parts:
    """The parts of a stream that are scored in windows of seq_len tokens: all, or about max_tokens tokens of them. A
    document's bytes are split over its parts by the `lengths` of their ids."""
    starts, ends, docs = part_bounds(doc_starts, seq_len, max_tokens)
    picked = chosen(ends - starts, max_tokens)
    sizes = doc_bytes[docs]
    for doc in np.unique(docs[picked]).tolist():
        first, last = np.searchsorted(docs, [doc, doc + 1]).tolist()
        if last - first > 1:
            begin, end = int(doc_starts[doc]), int(doc_starts[doc + 1])
            weights = lengths[tokens[begin + 1 : end + 1]]
            sizes[first:last] = shared(int(doc_bytes[doc]), weights, starts[first:last] - begin)
    return Parts(starts[picked], ends[picked], docs[picked], sizes[picked])


def shared(total: int, weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """`total` split over the stretches of `weights` that begin at `starts`, in proportion, in whole numbers."""
    upto = np.append(np.add.reduceat(weights, starts), 0).cumsum()[:-1]
    return np.diff(np.round(upto * (total / max(1, upto[-1]))).astype(np.int64), prepend=0)
