import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from sparsemix.config import ConfigError
from sparsemix.evaluate.ngram import ngram_baselines, ngram_nats

EOT = 0


class SlowModel:
    """The same equation with dictionaries, one token at a time."""

    def __init__(self, stream, vocab_size, max_order):
        self.vocab_size, self.max_order, self.total = vocab_size, max_order, len(stream) - 1
        self.unigram = Counter(stream[1:])
        self.followers = defaultdict(Counter)
        for t in range(1, len(stream)):
            context = document_context(stream, t)
            for length in range(1, min(max_order - 1, len(context)) + 1):
                self.followers[context[-length:]][stream[t]] += 1

    def probability(self, word, context):
        if not context:
            return (self.unigram[word] + 1) / (self.total + self.vocab_size)
        shorter = self.probability(word, context[1:])
        counts = self.followers.get(context)
        if counts is None:
            return shorter
        return (counts[word] + len(counts) * shorter) / (counts.total() + len(counts))

    def nats(self, stream, order):
        contexts = [document_context(stream, t) for t in range(1, len(stream))]
        contexts = [context[len(context) - min(order - 1, len(context)) :] for context in contexts]
        return [-math.log(self.probability(w, h)) for w, h in zip(stream[1:], contexts, strict=True)]


def document_context(stream, t):
    start = t - 1
    while start > 0 and stream[start] != EOT:
        start -= 1
    return tuple(stream[start:t])


def documents(rng, num_documents, vocab_size, longest=9):
    """Random documents, some empty, some of one token, as one stream."""
    stream = [EOT]
    for length in rng.integers(0, longest, num_documents):
        stream += [*rng.integers(1, vocab_size, length).tolist(), EOT]
    return np.array(stream)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(3, np.uint16), (6, np.int32), (65536, np.uint16)])
def test_every_order_equals_a_dictionary_model_token_by_token(vocab_size, dtype):
    rng = np.random.default_rng(0)
    # In the large vocabulary the ids are few but high, so that a wrapped key would be seen.
    spread = (vocab_size - 1) // 5 if vocab_size > 6 else 1
    train = (documents(rng, 150, min(vocab_size, 6)) * spread).astype(dtype)
    test = (documents(rng, 60, min(vocab_size, 6)) * spread).astype(dtype)
    fast = ngram_nats(train, test, vocab_size, max_order=5)
    slow = SlowModel(train.tolist(), vocab_size, 5)
    expected = np.array([slow.nats(test.tolist(), order) for order in range(1, 6)])
    np.testing.assert_allclose(fast, expected, rtol=0, atol=1e-12)


def test_a_context_never_reaches_into_the_document_before():
    train = documents(np.random.default_rng(1), 300, 5)
    before = np.array([EOT, 1, 2, 3, 4, EOT, 2, 1, 3, EOT])
    other = np.array([EOT, 4, 4, 1, 2, EOT, 2, 1, 3, EOT])
    a, b = ngram_nats(train, before, 5), ngram_nats(train, other, 5)
    np.testing.assert_array_equal(a[:, 5:], b[:, 5:])
    # Control: inside one document, the same change of earlier tokens does move later predictions.
    joined, changed = np.delete(before, 5), np.delete(other, 5)
    assert not np.array_equal(ngram_nats(train, joined, 5)[:, 5:], ngram_nats(train, changed, 5)[:, 5:])


def test_probabilities_sum_to_one_after_any_context():
    rng = np.random.default_rng(2)
    vocab_size = 5
    train = documents(rng, 80, vocab_size)
    contexts = [[], [4], [1, 2], *(rng.integers(1, vocab_size, 6).tolist() for _ in range(30))]
    for context in contexts:
        streams = [np.array([EOT, *context, word]) for word in range(vocab_size)]
        last = np.array([ngram_nats(train, stream, vocab_size)[:, -1] for stream in streams])
        np.testing.assert_allclose(np.exp(-last).sum(axis=0), 1, rtol=0, atol=1e-12)


def test_the_bigram_reaches_the_entropy_of_markov_data_and_the_unigram_does_not():
    rng = np.random.default_rng(3)
    vocab_size, length = 12, 300_000
    transition = rng.dirichlet(np.full(vocab_size, 0.3), size=vocab_size)
    cumulative = transition.cumsum(axis=1)
    draws = rng.random(length)
    chain = [EOT]
    for u in draws:
        chain.append(min(int(np.searchsorted(cumulative[chain[-1]], u)), vocab_size - 1))
    stream = np.array([*chain, EOT])
    train, test = stream[:200_001], np.concatenate(([EOT], stream[200_001:]))
    occupancy = np.bincount(test[:-1], minlength=vocab_size) / (len(test) - 1)
    entropy = float(-(occupancy[:, None] * transition * np.log2(np.maximum(transition, 1e-300))).sum())
    # One byte per token, so that bits per byte are bits per token.
    bpb = ngram_baselines(train, test, len(test) - 1, vocab_size)
    assert abs(bpb["bigram_bpb"] / entropy - 1) < 0.01
    assert bpb["unigram_bpb"] > 1.1 * entropy
    assert bpb["unigram_bpb"] < bpb["uniform_bpb"]


def test_the_fivegram_learns_what_a_bigram_cannot():
    # The token after "1 1" is 2, after "2 1" it is 3: one token back does not tell.
    train = np.array([EOT, *[1, 1, 2, 1, 3] * 400, EOT])
    test = np.array([EOT, *[1, 1, 2, 1, 3] * 40, EOT])
    bpb = ngram_baselines(train, test, 200, 4)
    assert bpb["fivegram_bpb"] < 0.2 < 0.6 < bpb["bigram_bpb"]


def test_uniform_is_log2_of_the_vocabulary_per_predicted_token():
    train = documents(np.random.default_rng(4), 20, 7)
    test = np.array([EOT, 1, 2, 3, EOT, 5, EOT])
    assert ngram_baselines(train, test, 9, 7)["uniform_bpb"] == pytest.approx(6 * math.log2(7) / 9)


def test_tokens_never_seen_in_training_cost_finitely_many_bits():
    nats = ngram_nats(np.array([EOT, 1, EOT]), np.array([EOT, 2, 3, 3, 2, EOT]), 4)
    assert np.isfinite(nats).all()
    # c(2) = 0 of two counted tokens, V = 4; after EOT, 1 was the only follower: (0 + 1 * 1/6) / (1 + 1).
    assert nats[0, 0] == pytest.approx(math.log(6))
    assert nats[1, 0] == pytest.approx(math.log(12))


@pytest.mark.parametrize(
    ("train", "test", "test_bytes", "message"),
    [
        ([0], [0, 1], 1, "train has 1 tokens"),
        ([0, 1], [0], 1, "test has 1 tokens"),
        ([0, 4], [0, 1], 1, r"train ids 0\.\.4 must lie in \[0, vocab_size=4\)"),
        ([0, 1], [0, -1], 1, "test ids -1"),
        ([0, 1], [1, 0], 1, r"test\[0\]=1"),
        ([0, 1], [0, 1], 0, "test_bytes=0"),
    ],
)
def test_streams_that_cannot_be_scored_are_refused(train, test, test_bytes, message):
    with pytest.raises(ConfigError, match=message):
        ngram_baselines(np.array(train), np.array(test), test_bytes, 4)
