"""Sliding windows over documents: every token scored once, under the causal rule, never across documents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer
from torch import Tensor

from sparsemix.evaluate.per_token import on_tokens
from sparsemix.evaluate.perplexity import evaluating
from sparsemix.layers import Ctx
from sparsemix.model import LM, Output, token_nats

Ids = Integer[np.ndarray, " _"]


class Window(NamedTuple):
    """Targets [begin, end) of a document, of which those from `scored` on count here; the others are context."""

    doc: int
    begin: int
    end: int
    scored: int
    last: bool


def windows(doc: int, length: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context` targets over a document of `length`. The first is scored entirely, each further one
    ends `stride` targets on (at the document's end at the latest), reaches back over `context` targets and is scored
    from where the one before ended."""
    end = 0
    while end < length:
        scored, end = end, min(length, end + (stride if end else context))
        yield Window(doc, max(0, end - context), end, scored, end == length)


class WindowBatch(NamedTuple):
    """Rows padded to the longest: the inputs, their targets (-100 in padding), which of them count, and which are real
    (None: all)."""

    rows: list[Window]
    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    scored: Bool[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None


def batch_of(rows: list[Window], ids: Sequence[Ids], first: int, device: torch.device) -> WindowBatch:
    """Each window's inputs are the tokens just before its targets; before a document stands the token `first`."""
    T = max(row.end - row.begin for row in rows)
    tokens, targets = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -100, np.int64)
    scored = np.zeros((len(rows), T), bool)
    for i, row in enumerate(rows):
        n, doc = row.end - row.begin, ids[row.doc]
        targets[i, :n] = doc[row.begin : row.end]
        tokens[i, 1:n] = targets[i, : n - 1]
        tokens[i, 0] = doc[row.begin - 1] if row.begin else first
        scored[i, row.scored - row.begin : n] = True
    real = targets >= 0
    moved = (torch.from_numpy(a).to(device) for a in (tokens, targets, scored))
    return WindowBatch(rows, *moved, valid=None if real.all() else torch.from_numpy(real).to(device))


@dataclass
class Scores:
    """By document: nats of its tokens; and, where last words are asked for, nats of the last word and whether it would
    be decoded greedily, whole. routed: of each Mixture-of-Depths layer [tokens it took, tokens that reached it]."""

    nats: np.ndarray
    tokens: np.ndarray
    word_nats: np.ndarray
    word_right: np.ndarray
    routed: dict[str, np.ndarray] = field(default_factory=dict)


def score(
    model: LM,
    ids: Sequence[Ids],
    first: int,
    context: int,
    stride: int,
    word_from: Sequence[int] = (),
    batch_tokens: int | None = None,
    on_windows: Callable[[int, int], None] | None = None,
    causal: bool = True,
) -> Scores:
    """Causal losses of documents given as token ids, each preceded by the token `first` and alone in its window. With
    `causal` False those under the routing of training, which may see a window's later tokens: no valid likelihood, and
    what batch statistics say depends on the batch.

    word_from: the index of each document's first token of its last word, which is scored in the document's last window
    whichever window scored it as text. batch_tokens bounds a batch, by default so that its logits have at most 2^25
    entries; results do not depend on it. on_windows gets the windows done and their number."""
    todo = [w for doc, own in enumerate(ids) for w in windows(doc, len(own), context, stride)]
    # Windows of a length share a batch, so that little is padding.
    todo.sort(key=lambda w: w.begin - w.end)
    limit = batch_tokens or min(4096, 2**25 // model.config.vocab_size)
    empty = [np.zeros(len(ids)) for _ in range(3)]
    found = Scores(empty[0], np.array([len(own) for own in ids]), empty[1], empty[2].astype(bool))
    done = 0
    with evaluating(model, causal):
        while done < len(todo):
            rows = todo[done : done + max(1, limit // (todo[done].end - todo[done].begin))]
            batch = batch_of(rows, ids, first, model.embed.weight.device)
            output = model(batch.tokens, Ctx(valid=batch.valid, causal=causal))
            _add(found, batch, output, word_from)
            done += len(rows)
            if on_windows:
                on_windows(done, len(todo))
    return found


def _add(found: Scores, batch: WindowBatch, output: Output, word_from: Sequence[int]) -> None:
    nats = token_nats(output.logits, batch.targets)
    sums = torch.where(batch.scored, nats.double(), 0.0).sum(dim=1).cpu().numpy()
    np.add.at(found.nats, [row.doc for row in batch.rows], sums)
    if word_from:
        right = (output.logits.argmax(dim=-1) == batch.targets).cpu().numpy()
        for i, row in enumerate(batch.rows):
            if row.last:
                word = slice(word_from[row.doc] - row.begin, row.end - row.begin)
                assert word.start >= 0
                found.word_nats[row.doc] = float(nats[i, word].double().sum())
                found.word_right[row.doc] = bool(right[i, word].all())
    routed = {name: value for name, value in output.aux.stats.items() if name.endswith(".routed")}
    for name, value in on_tokens(routed, batch.tokens.shape)[0].items():
        value = value[batch.scored]
        counts = np.array([int((value == 1).sum()), int((~value.isnan()).sum())])
        path = name.removesuffix(".routed")
        found.routed[path] = found.routed.get(path, np.zeros(2, np.int64)) + counts
