"""What of a split is scored, and in which parts."""

import numpy as np
import pytest
import torch
from texts import config_of, documents_of, make_texts, write_corpus

from sparsemix.data import prepare
from sparsemix.data.parts import FEWEST_PARTS, LONGEST_PART, chosen, part_bounds, shared

PLACES = [(1, 7), (3, 64), (50, 100_000)]


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A few long documents among many short ones."""
    folder = tmp_path_factory.mktemp("books")
    texts = make_texts(120, seed=3)
    texts += [" ".join(make_texts(60, seed=10 + i)) for i in range(6)]
    return prepare(config_of(write_corpus(folder / "a.jsonl", texts)), folder / "shards")


@pytest.mark.parametrize("max_tokens", [None, 1, 100, 400, 3000])
@pytest.mark.parametrize(("batch_size", "seq_len"), PLACES)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_token_of_the_parts_is_scored_exactly_once(books, split, batch_size, seq_len, max_tokens):
    parts = books.parts(split, seq_len, max_tokens)
    tokens, counts, scored = books.tokens(split), np.zeros(len(parts.starts), int), []
    for batch in books.eval_batches(split, batch_size, seq_len, max_tokens):
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.valid is None else batch.valid
        assert batch.tokens.shape[0] <= batch_size and batch.tokens.shape[1] == seq_len
        assert (batch.targets[~real] == -100).all()
        # Within a stretch an input is the target before it.
        same = (batch.doc_ids[:, 1:] == batch.doc_ids[:, :-1]) & real[:, 1:]
        assert torch.equal(batch.tokens[:, 1:][same], batch.targets[:, :-1][same])
        scored += batch.targets[real].tolist()
        counts += np.bincount(batch.part_ids[real], minlength=len(counts))
    expected = [tokens[start + 1 : end + 1] for start, end in zip(parts.starts, parts.ends, strict=True)]
    assert scored == np.concatenate(expected).tolist()
    assert counts.tolist() == (parts.ends - parts.starts).tolist()


def test_a_part_never_reaches_into_another_document(books):
    starts = books.starts("test")
    for max_tokens in (None, 300):
        parts = books.parts("test", 16, max_tokens)
        assert (starts[parts.docs] <= parts.starts).all() and (parts.ends <= starts[parts.docs + 1]).all()


def test_one_long_document_does_not_eat_the_budget():
    # Today's fault: the first of 36 documents of 177,946 tokens was read whole where 8,192 were asked for.
    starts = np.arange(37) * 177_946
    first, last, docs = part_bounds(starts, 128, 8192)
    picked = chosen(last - first, 8192)
    assert 8192 * 0.85 <= (last - first)[picked].sum() <= 8192
    assert len(picked) >= FEWEST_PARTS * 0.85 and len(np.unique(docs[picked])) >= 10


@pytest.mark.parametrize("max_tokens", [500, 5000, 20_000])
@pytest.mark.parametrize("seq_len", [1, 16, 100])
def test_what_is_scored_fits_the_budget_and_parts_are_whole_windows(max_tokens, seq_len):
    starts = np.concatenate(([0], np.cumsum(np.random.default_rng(0).integers(1, 9000, 60))))
    first, last, docs = part_bounds(starts, seq_len, max_tokens)
    picked = chosen(last - first, max_tokens)
    assert (last - first)[picked].sum() <= max_tokens
    inner = docs[1:] == docs[:-1]
    sizes = np.unique((last - first)[:-1][inner])
    assert len(sizes) == 1 and sizes[0] % seq_len == 0
    assert sizes[0] <= min(LONGEST_PART, max(seq_len, max_tokens // FEWEST_PARTS))


def test_the_parts_of_a_budget_are_drawn_evenly_from_the_whole_split():
    starts = np.array([0, 90_000, 100_000])
    first, last, docs = part_bounds(starts, 10, 20_000)
    picked = chosen(last - first, 20_000)
    share = (last - first)[picked][docs[picked] == 0].sum() / (last - first)[picked].sum()
    assert share == pytest.approx(0.9, abs=0.1)


def test_a_single_short_document_is_scored_in_two_parts():
    first, last, _ = part_bounds(np.array([0, 40]), 512, None)
    assert (first.tolist(), last.tolist()) == ([0, 20], [20, 40])


def test_the_bytes_of_a_part_are_those_of_its_text(books):
    tokenizer, texts = books.tokenizer(), documents_of(books, "test")
    parts = books.parts("test", 16)
    for doc, text in enumerate(texts):
        assert parts.bytes[parts.docs == doc].sum() == len(text.encode())
    several = [p for p in range(len(parts.docs)) if (parts.docs == parts.docs[p]).sum() > 1]
    assert several
    for p in several:
        ids = books.tokens("test")[parts.starts[p] + 1 : parts.ends[p] + 1]
        assert parts.bytes[p] == len(tokenizer.decode(ids[ids != 0].tolist()).encode())


def test_shared_bytes_add_up_whatever_the_weights():
    weights = np.array([3, 1, 0, 5, 2, 2])
    assert shared(1001, weights, np.array([0, 2, 5])).sum() == 1001
    assert shared(26, weights, np.array([0, 2, 5])).tolist() == [8, 14, 4]


@pytest.mark.parametrize("size", [1, 4])
def test_the_context_of_a_part_is_the_tokens_before_it_in_its_document(books, size):
    tokens = np.asarray(books.tokens("test")).astype(int)
    parts = books.parts("test", 16, 500)
    ids, scored = parts.with_context(tokens, size, 0)
    assert ids[0] == 0
    at = np.flatnonzero(scored)
    places = np.concatenate([np.arange(s + 1, e + 1) for s, e in zip(parts.starts, parts.ends, strict=True)])
    assert ids[at].tolist() == tokens[places].tolist()
    for i, place in zip(at, places, strict=True):
        begin = max(d for d in books.starts("test") if d < place)
        context = tokens[max(begin, place - size) : place]
        assert ids[i - len(context) : i].tolist() == context.tolist()
