import itertools
import random

import numpy as np
import pytest

from sparsemix.data.token_stream import byte_pieces, cuts, is_own, write_stream
from sparsemix.data.tokenizer import encode_batch, end_of_text, train_tokenizer

SIGNS = [
    *"abXYZ019 '.,()_\n\t\r\x0b\x1c\x00\x85\xa0\u1680\u2009\u2028\u202f\u3000éßяжก的あ😀\u2019",
    *("'s", "'ll", "'re", " ", "  ", " ", "\n\n", "word", "don't"),
]


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(1)
    return train_tokenizer(["".join(rng.choices(SIGNS, k=2000)) for _ in range(30)] + ["some words in here " * 50], 600)


def streamed(tokenizer, texts, path):
    starts = write_stream(tokenizer, (text.encode() for text in texts), path)
    ids = np.fromfile(path, np.uint16)
    assert starts[-1] == len(ids) - 1 and (ids[starts] == end_of_text(tokenizer)).all()
    return [ids[a + 1 : b].tolist() for a, b in itertools.pairwise(starts)]


def test_words_encoded_one_by_one_give_the_ids_of_the_whole_text(tokenizer, tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices(SIGNS, k=rng.randrange(1, 60))) for _ in range(1500)]
    texts += [" ".join(rng.choices(SIGNS, k=30_000)), "x" * 700, "\n" * 700, "的" * 700, "".join(SIGNS)]
    assert is_own(tokenizer)
    want = [ids.tolist() for ids in encode_batch(tokenizer, texts)]
    assert streamed(tokenizer, texts, tmp_path / "a.bin") == want
    # The control: were words cut after an apostrophe too, it would show.
    assert "'s" in "".join(texts) and not cuts(np.frombuffer(b"it's", np.uint8))[3]


def test_another_tokenizer_encodes_whole_texts(tokenizer, tmp_path):
    from tokenizers import Tokenizer, models

    other = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, " ": 2, "ab": 3, "b": 4}, merges=[("a", "b")]))
    assert not is_own(other)
    texts = ["ab a", "b ab ", "a"]
    assert streamed(other, texts, tmp_path / "a.bin") == [ids.tolist() for ids in encode_batch(other, texts)]


def test_a_long_text_is_cut_where_words_end_and_never_within_a_character():
    spaced = ("word " * 5000).encode()
    pieces = list(byte_pieces(spaced, 1000))
    assert b"".join(pieces) == spaced and all(p.startswith(b" ") for p in pieces[1:]) and len(pieces) < 27
    solid = ("的é" * 5000).encode()
    pieces = list(byte_pieces(solid, 1000))
    assert b"".join(pieces) == solid and max(map(len, pieces)) <= 1000
    assert "".join(p.decode() for p in pieces) == solid.decode()


def test_a_text_longer_than_a_block_is_lossless_in_every_script(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsemix.data.token_stream._BLOCK", 5000)
    monkeypatch.setattr("sparsemix.data.token_stream._STRETCH", 900)
    rng = random.Random(2)
    texts = ["".join(rng.choices(signs, k=20_000)) for signs in (SIGNS, "的一是在不", "กขฃคฅ", "ab")]
    for text, ids in zip(texts, streamed(tokenizer, texts, tmp_path / "a.bin"), strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_forgetting_words_changes_nothing(tokenizer, tmp_path, monkeypatch):
    rng = random.Random(3)
    texts = ["".join(rng.choices(SIGNS, k=200)) for _ in range(100)]
    want = streamed(tokenizer, texts, tmp_path / "a.bin")
    monkeypatch.setattr("sparsemix.data.token_stream._WORDS", 20)
    monkeypatch.setattr("sparsemix.data.token_stream._SLOT_BITS", 2)
    monkeypatch.setattr("sparsemix.data.spool.BATCH", 500)
    assert streamed(tokenizer, texts, tmp_path / "b.bin") == want
