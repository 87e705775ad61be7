import itertools

import numpy as np
import pytest
import torch
from texts import SPLITS, config_of, documents_of, make_texts, side_by_hash, write_corpus

from sparsemix.config import ConfigError, parse
from sparsemix.data import DataConfig, prepare
from sparsemix.data.shards import permute


def test_decoding_a_documents_tokens_gives_its_text_and_bytes(corpus):
    texts, _, s = corpus
    decoded = {split: documents_of(s, split) for split in SPLITS}
    assert sorted(itertools.chain(*decoded.values())) == sorted(texts)
    for split in SPLITS:
        assert s.bytes(split).tolist() == [len(t.encode()) for t in decoded[split]]
        assert all(side_by_hash(t) == split for t in decoded[split])
        assert (s.tokens(split)[s.starts(split)] == 0).all()
        assert (s.tokens(split) == 0).sum() == len(s.starts(split))
        assert s.starts(split)[-1] == len(s.tokens(split)) - 1


def test_the_manifest_adds_up(corpus):
    texts, config, s = corpus
    m = s.manifest
    assert m["bytes_total"] == sum(len(t.encode()) for t in texts) == sum(m["bytes"].values())
    assert sum(m["documents"].values()) == len(texts)
    assert m["tokens"] == {split: len(s.tokens(split)) for split in SPLITS}
    assert m["bytes_per_token"] == m["bytes_total"] / sum(m["tokens"].values())
    assert (m["vocab_size"], m["end_of_text"], m["duplicates_dropped"], m["cut_into_pieces"]) == (300, 0, 0, False)
    assert parse(DataConfig, m["settings"]) == config


def test_no_document_occurs_in_two_splits_even_as_an_edited_copy(tmp_path):
    texts = make_texts(30, seed=1)
    copies = [t.replace(" ", "  ") for t in texts]
    s = prepare(config_of(write_corpus(tmp_path / "a.jsonl", texts + copies)), tmp_path / "s")
    assert s.manifest["duplicates_dropped"] == 30
    seen = [" ".join(t.split()) for split in SPLITS for t in documents_of(s, split)]
    assert len(seen) == len(set(seen)) == 30


def test_the_tokenizer_never_saw_the_test_split(tmp_path):
    def with_word(split):
        made = (f"quixotry {text[:60]} quixotry quixotry" for text in make_texts(400, seed=4))
        return [t for t in made if side_by_hash(t) == split]

    def learned(split, name):
        texts = make_texts(240, seed=2) + with_word(split)[:40]
        config = config_of(write_corpus(tmp_path / f"{name}.jsonl", texts)).replace(vocab_size=600)
        s = prepare(config, tmp_path / name)
        assert sum("quixotry" in t for t in documents_of(s, split)) >= 30
        return any("quixotry" in token for token in s.tokenizer().get_vocab())

    assert not learned("test", "a")
    assert not learned("validation", "b")
    assert learned("train", "control")


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000, 1009])
def test_the_permutation_is_a_bijection_in_every_epoch_and_for_every_seed(n):
    i = np.arange(n)
    for seed in (0, 1, -5, 2**70):
        for epoch in (0, 1, 10**6):
            assert sorted(permute(i, n, seed, np.full(n, epoch))) == list(range(n))


def test_the_permutation_differs_by_seed_and_epoch_and_looks_shuffled():
    i, n = np.arange(1009), 1009
    orders = [permute(i, n, seed, np.full(n, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for a in range(len(orders)):
        for b in [i, *orders[:a]]:
            # Independent orders agree in one place on average and rarely in ten.
            assert (orders[a] == b).sum() < 10
            assert abs(np.corrcoef(orders[a], b)[0, 1]) < 0.15
        assert (np.diff(orders[a]) == 1).sum() < 10


def test_batches_do_not_depend_on_how_the_samples_are_cut_into_batches(corpus):
    s = corpus[2]
    n = s.num_windows(17)
    whole = s.batch(n - 5, 12, 17, seed=3)
    parts = [s.batch(n - 5, 1, 17, seed=3), s.batch(n - 4, 7, 17, seed=3), s.batch(n + 3, 4, 17, seed=3)]
    for name in ("tokens", "targets", "positions", "doc_ids"):
        torch.testing.assert_close(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    assert whole.valid is None
    assert not torch.equal(whole.tokens, s.batch(n - 5, 12, 17, seed=4).tokens)


def test_an_epoch_visits_every_training_window_once_and_the_next_in_another_order(corpus):
    s, T = corpus[2], 13
    stream = s.tokens("train").astype(np.int64)
    n = s.num_windows(T)
    assert n == (len(stream) - 1) // T
    first, second = s.batch(0, n, T, seed=0), s.batch(n, n, T, seed=0)
    expected = sorted([*stream[w * T : w * T + T + 1]] for w in range(n))
    for batch in (first, second):
        rows = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)
        assert sorted(rows.tolist()) == expected
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert torch.equal(batch.positions, torch.arange(T).expand(n, T))
    assert not torch.equal(first.tokens, second.tokens)


def test_training_doc_ids_name_the_document_of_each_input(corpus):
    s, T = corpus[2], 13
    batch, starts = s.batch(0, s.num_windows(T), T, seed=0), s.starts("train")
    windows = permute(np.arange(len(batch.tokens)), len(batch.tokens), 0, np.zeros(len(batch.tokens), np.int64))
    for row, w in enumerate(windows):
        for p in range(T):
            d = int(batch.doc_ids[row, p])
            assert starts[d] <= w * T + p < starts[d + 1]


def test_padding_is_marked_only_where_there_is_some(corpus):
    s = corpus[2]
    total = int(s.starts("test")[-1])
    [whole] = s.eval_batches("test", 1, total)
    assert whole.valid is None
    [padded] = s.eval_batches("test", 1, total + 3)
    assert padded.valid is not None and padded.valid.sum() == total and not padded.valid[0, -3:].any()


def test_a_sequence_longer_than_the_training_split_is_refused(corpus):
    s = corpus[2]
    length = len(s.tokens("train"))
    assert s.batch(0, 2, length - 1, seed=0).tokens.shape == (2, length - 1)
    with pytest.raises(ConfigError, match=f"seq_len={length} must be below the training split's {length} tokens"):
        s.batch(0, 2, length, seed=0)
