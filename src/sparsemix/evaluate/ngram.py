"""Bits per byte of count models (uniform, unigram, bigram, 5-gram): what a neural model must beat to have learned."""

import math

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from sparsemix.config import ConfigError


def ngram_baselines(
    train: Integer[np.ndarray, "N"],
    test: Integer[np.ndarray, "T"],
    test_bytes: int,
    vocab_size: int,
    scored: Bool[np.ndarray, "T"] | None = None,
    eot: int = 0,
) -> dict[str, float]:
    """bpb = sum_t -log2 p(test_t | context) / test_bytes for t >= 1 (those that `scored` marks), under four models
    counted on `train`.

    Keys: uniform_bpb, unigram_bpb, bigram_bpb, fivegram_bpb. Both streams are `EOT d1 EOT d2 ... EOT`, EOT = id `eot`.
    Raises ConfigError as `ngram_nats` does, and if test_bytes < 1."""
    if test_bytes < 1:
        raise ConfigError(f"test_bytes={test_bytes} must be >= 1: count the UTF-8 bytes of the test documents")
    asked = np.ones(len(test) - 1, bool) if scored is None else scored[1:]
    bits = ngram_nats(train, test, vocab_size, max_order=5, eot=eot)[:, asked].sum(axis=1) / math.log(2)
    return {
        "uniform_bpb": int(asked.sum()) * math.log2(vocab_size) / test_bytes,
        "unigram_bpb": float(bits[0]) / test_bytes,
        "bigram_bpb": float(bits[1]) / test_bytes,
        "fivegram_bpb": float(bits[4]) / test_bytes,
    }


def ngram_nats(
    train: Integer[np.ndarray, "N"], test: Integer[np.ndarray, "T"], vocab_size: int, max_order: int = 5, eot: int = 0
) -> Float[np.ndarray, "max_order T-1"]:
    """-ln p_n(test_t | h) for t = 1..T-1, row n-1 for order n, with Witten-Bell interpolation:
    p_n(w|h) = (c(hw) + T(h) p_{n-1}(w|h')) / (c(h) + T(h)), T(h) = distinct continuations of h, h' = h less its
    oldest token, p_1(w) = (c(w) + 1) / (N - 1 + V). Counts are exact.

    Witten-Bell because it has no parameter to tune, so the baseline cannot be weakened by neglect. A context starts
    at its document's EOT at the earliest; where that leaves fewer than n-1 tokens, p_n is p of that shorter context.
    Raises ConfigError for streams of fewer than two tokens and for ids outside [0, vocab_size)."""
    for name, tokens in (("train", train), ("test", test)):
        if len(tokens) < 2:
            raise ConfigError(f"{name} has {len(tokens)} tokens and must have >= 2: an end-of-text id, then documents")
        if not 0 <= (low := int(tokens.min())) <= (high := int(tokens.max())) < vocab_size:
            raise ConfigError(f"{name} ids {low}..{high} must lie in [0, vocab_size={vocab_size}): check the tokenizer")
    if int(test[0]) != eot:
        raise ConfigError(f"test[0]={int(test[0])} must be the end-of-text id {eot}: start at a document")
    words, asked = train.astype(np.int64), test.astype(np.int64)
    unigram = (np.bincount(words[1:], minlength=vocab_size) + 1) / (len(words) - 1 + vocab_size)
    p = unigram[asked[1:]]
    rows = [-np.log(p)]
    # A gram's id is its rank among the grams of its order, so (id of the prefix, token) always fits in 64 bits.
    train_ids, test_ids = words, asked
    for _ in range(max_order - 1):
        train_prefix, test_prefix = _contexts(train_ids, words, eot), _contexts(test_ids, asked, eot)
        counted = train_prefix >= 0
        grams, ranks, counts = np.unique(
            train_prefix[counted] * vocab_size + words[1:][counted], return_inverse=True, return_counts=True
        )
        test_ids = np.concatenate(([-1], _find(grams, test_prefix, asked[1:], vocab_size)))
        p = _witten_bell(p, grams // vocab_size, counts, test_prefix, test_ids[1:])
        train_ids = np.full(len(words), -1)
        train_ids[1:][counted] = ranks
        rows.append(-np.log(p))
    return np.stack(rows)


def _contexts(ids: Int[np.ndarray, "T"], tokens: Int[np.ndarray, "T"], eot: int) -> Int[np.ndarray, "T-1"]:
    """The id of the gram that ends just before each token from the second on, -1 where there is none.

    `ids[t]` is the gram that ends at t. One that ends in EOT and is longer than it reaches into another document."""
    context = ids[:-1].copy()
    if ids is not tokens:
        context[tokens[:-1] == eot] = -1
    return context


def _find(
    grams: Int[np.ndarray, "G"], prefix: Int[np.ndarray, "M"], tokens: Int[np.ndarray, "M"], vocab_size: int
) -> Int[np.ndarray, "M"]:
    """The rank of each (prefix, token) among the sorted `grams`, -1 where it never occurred in training."""
    if len(grams) == 0:
        return np.full(len(prefix), -1)
    keys = np.where(prefix >= 0, prefix * vocab_size + tokens, -1)
    ranks = np.minimum(np.searchsorted(grams, keys), len(grams) - 1)
    return np.where(grams[ranks] == keys, ranks, -1)


def _witten_bell(
    p_shorter: Float[np.ndarray, "M"],
    prefix_of_gram: Int[np.ndarray, "G"],
    counts: Int[np.ndarray, "G"],
    prefix: Int[np.ndarray, "M"],
    gram: Int[np.ndarray, "M"],
) -> Float[np.ndarray, "M"]:
    """(c(hw) + T(h) p_shorter) / (c(h) + T(h)) where h occurred in training, p_shorter elsewhere."""
    num_prefixes = max(int(prefix_of_gram[-1]) if len(prefix_of_gram) else 0, int(prefix.max())) + 1
    followed = np.bincount(prefix_of_gram, weights=counts, minlength=num_prefixes)[prefix]  # c(h)
    distinct = np.bincount(prefix_of_gram, minlength=num_prefixes)[prefix]  # T(h)
    occurred = np.where(gram >= 0, counts[gram], 0) if len(counts) else 0  # c(hw)
    seen = (prefix >= 0) & (followed > 0)
    return np.where(seen, occurred + distinct * p_shorter, p_shorter) / np.where(seen, followed + distinct, 1)
