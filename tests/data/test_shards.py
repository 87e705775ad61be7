import itertools
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from sparsemix.config import ConfigError, parse
from sparsemix.data import DataConfig, Shards, prepare, shards
from sparsemix.data.corpus import read_documents, split_of
from sparsemix.data.shards import permute
from sparsemix.data.tokenizer import encode_batch, train_tokenizer

SPLITS = ("train", "validation", "test")


def make_texts(n=60, seed=0):
    rng = random.Random(seed)
    vocabulary = [f"{rng.choice('bcdfgh')}{rng.choice('aeiou')}{rng.choice('klmnä€')}{i}" for i in range(400)]
    return [" ".join(rng.choices(vocabulary, k=rng.randrange(1, 120))) + "\n" for _ in range(n)]


def write_corpus(path, texts):
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    return str(path)


def config_of(path, **changes):
    return DataConfig(text=(path,), vocab_size=300, validation_fraction=0.2, test_fraction=0.2, **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts()
    config = config_of(write_corpus(folder / "a.jsonl", texts))
    return texts, config, prepare(config, folder / "shards")


def documents_of(s, split):
    tokens, starts = s.tokens(split), s.starts(split)
    decode = s.tokenizer().decode
    return [decode(tokens[a + 1 : b].tolist(), skip_special_tokens=False) for a, b in itertools.pairwise(starts)]


def test_decoding_a_documents_tokens_gives_its_text_and_bytes(corpus):
    texts, _, s = corpus
    decoded = {split: documents_of(s, split) for split in SPLITS}
    assert sorted(itertools.chain(*decoded.values())) == sorted(texts)
    for split in SPLITS:
        assert s.bytes(split).tolist() == [len(t.encode()) for t in decoded[split]]
        assert all(split_of(t, 0.2, 0.2) == split for t in decoded[split])
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
        return [t for i in range(400) if split_of(t := f"quixotry {make_texts(1, i)[0]}" * 3, 0.2, 0.2) == split]

    def learned(split, name):
        texts = [t for t in make_texts(60, seed=2) if len(t) > 50] + with_word(split)[:40]
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


@pytest.mark.parametrize("max_tokens", [None, 1, 100, 400])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 7), (3, 64), (50, 100_000)])
def test_every_evaluated_token_is_scored_exactly_once(corpus, max_tokens, batch_size, seq_len):
    s = corpus[2]
    ids, sizes = s.eval_documents("validation", max_tokens)
    targets, doc_ids = [], []
    for batch in s.eval_batches("validation", batch_size, seq_len, max_tokens):
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.valid is None else batch.valid
        assert batch.tokens.shape[0] <= batch_size and batch.tokens.shape[1] == seq_len
        assert (batch.targets[~real] == -100).all()
        assert torch.equal(batch.tokens[:, 1:][real[:, 1:]], batch.targets[:, :-1][real[:, 1:]])
        targets += batch.targets[real].tolist()
        doc_ids += batch.doc_ids[real].tolist()
    end = s.starts("validation")[len(ids)]
    assert targets == s.tokens("validation")[1 : end + 1].tolist()
    assert np.bincount(doc_ids).tolist() == np.diff(s.starts("validation")[: len(ids) + 1]).tolist()
    texts = documents_of(s, "validation")[: len(ids)]
    assert sizes.sum() == sum(len(t.encode()) for t in texts)


def test_evaluation_takes_the_most_whole_documents_that_fit_and_at_least_one(corpus):
    s = corpus[2]
    starts = s.starts("validation").tolist()
    count = [len(s.eval_documents("validation", m)[0]) for m in (None, 1, starts[3], starts[3] - 1, starts[3] + 1)]
    assert count == [len(starts) - 1, 1, 3, 2, 3]


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


def test_preparing_twice_gives_identical_files(corpus, tmp_path):
    _, config, s = corpus
    prepare(config, tmp_path / "again")
    names = sorted(p.name for p in s.folder.iterdir())
    assert len(names) == 11
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (s.folder / name).read_bytes(), name


def test_finished_shards_are_reused_without_reading_the_text(corpus, monkeypatch):
    _, config, s = corpus
    monkeypatch.setattr(shards, "_collect", lambda *_: pytest.fail("the text was read"))
    assert prepare(config, s.folder).manifest == s.manifest
    named = config.replace(fingerprint=s.manifest["fingerprint"])
    assert prepare(named, s.folder).manifest == s.manifest


def test_shards_stand_without_their_sources(tmp_path):
    path = tmp_path / "a.jsonl"
    config = config_of(write_corpus(path, make_texts(8)))
    s = prepare(config, tmp_path / "s")
    path.unlink()
    assert prepare(config, tmp_path / "s").manifest == s.manifest
    with pytest.raises(ConfigError, match="no such file"):
        prepare(config, tmp_path / "new")


def test_changed_text_is_noticed_and_rewritten_equal_text_is_not(tmp_path):
    path, folder = tmp_path / "a.jsonl", tmp_path / "s"
    texts = make_texts(8)
    config = config_of(write_corpus(path, texts))
    s = prepare(config, folder)
    write_corpus(path, texts[::-1])
    os.utime(path, (1, 1))
    assert prepare(config, folder).manifest == s.manifest
    write_corpus(path, [*texts, "one more text"])
    with pytest.raises(ConfigError, match=r"holds shards of the text .*; delete it or choose another folder"):
        prepare(config, folder)
    named = config.replace(fingerprint=s.manifest["fingerprint"])
    with pytest.raises(ConfigError, match=r"fingerprint=.*: the text is now .*; restore it"):
        prepare(named, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_other_settings_or_other_things_is_refused(corpus, tmp_path):
    _, config, s = corpus
    with pytest.raises(ConfigError, match=r"other settings: vocab_size=300 there, 301 asked; choose another folder"):
        prepare(config.replace(vocab_size=301), s.folder)
    with pytest.raises(ConfigError, match=r"holds shards of the text .*, not abc"):
        prepare(config.replace(fingerprint="abc"), s.folder)
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no finished shards; prepare the data in an empty or new folder"):
        prepare(config, tmp_path / "things")
    with pytest.raises(ConfigError, match="holds no finished shards"):
        prepare(config, tmp_path / "things" / "note.txt")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(config, tmp_path / "things" / "note.txt" / "below")


def test_damaged_shards_are_refused(tmp_path):
    s = prepare(config_of(write_corpus(tmp_path / "a.jsonl", make_texts(8))), tmp_path / "s")
    path = s.folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match="holds damaged shards; delete the folder"):
        Shards.open(s.folder)
    path.unlink()
    with pytest.raises(ConfigError, match="holds damaged shards; delete the folder"):
        Shards.open(s.folder)


def test_a_killed_preparation_leaves_nothing_at_the_folder(corpus, tmp_path):
    _, config, s = corpus
    script = """
import os, signal, sys
from sparsemix.data import DataConfig, prepare, shards
write, calls = shards.write_stream, []
def kill(tokenizer, texts, path):
    calls.append(path)
    return write(tokenizer, texts, path) if len(calls) < 2 else os.kill(os.getpid(), signal.SIGKILL)
shards.write_stream = kill
prepare(DataConfig.model_validate_json(sys.argv[1]), shards.Path(sys.argv[2]))
"""
    folder = tmp_path / "out" / "s"
    done = subprocess.run([sys.executable, "-c", script, config.model_dump_json(), str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    [leftover] = folder.parent.iterdir()
    assert leftover.name.startswith(".s.") and (leftover / "train.bin").exists()
    assert prepare(config, folder).manifest == s.manifest


def test_an_interrupted_preparation_cleans_up(corpus, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_stream", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus[1], tmp_path / "out" / "s")
    assert list((tmp_path / "out").iterdir()) == []


def test_two_preparations_of_one_folder_agree(corpus, tmp_path, monkeypatch):
    _, config, s = corpus
    folder, write = tmp_path / "s", shards.write_stream

    def other_process_finishes_first(tokenizer, texts, path):
        monkeypatch.setattr(shards, "write_stream", write)
        prepare(config, folder)
        return write(tokenizer, texts, path)

    monkeypatch.setattr(shards, "write_stream", other_process_finishes_first)
    assert prepare(config, folder).manifest == s.manifest
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_single_file_is_cut_into_pieces_that_fill_every_split(tmp_path):
    paragraphs = [" ".join(t.split()[:40]) for t in make_texts(50, seed=5)]
    for name, text in (("paragraphs", "\n\n".join(paragraphs) + "\n"), ("lines", "\n".join(paragraphs))):
        (tmp_path / f"{name}.txt").write_text(text)
        s = prepare(config_of(str(tmp_path / f"{name}.txt")), tmp_path / name)
        assert s.manifest["cut_into_pieces"] and s.manifest["bytes_total"] == len(text.encode())
        pieces = [piece for split in SPLITS for piece in documents_of(s, split)]
        assert 40 <= len(pieces) <= 50 and all(piece in text for piece in pieces)
        assert min(s.manifest["documents"].values()) >= 1


@pytest.mark.parametrize("seed", range(6))
def test_three_documents_fill_three_splits(tmp_path, seed):
    texts = make_texts(3, seed=seed)
    s = prepare(config_of(write_corpus(tmp_path / "a.jsonl", texts)), tmp_path / "s")
    assert s.manifest["documents"] == dict.fromkeys(SPLITS, 1)
    assert not s.manifest["cut_into_pieces"]


def test_text_that_cannot_fill_three_splits_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one line\nanother line\none line\n")
    with pytest.raises(
        ConfigError, match=r"holds 2 different paragraphs or lines, .* three splits needs one; add text"
    ):
        prepare(config_of(str(tmp_path / "a.txt")), tmp_path / "s")


def test_progress_names_its_stages_in_order(tmp_path):
    seen = []
    config = config_of(write_corpus(tmp_path / "a.jsonl", make_texts(8)))
    prepare(config, tmp_path / "s", lambda *report: seen.append(report))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["reading", "training the tokenizer", "tokenizing"]
    assert seen[7][1] == sum(len(d.text.encode()) for d in read_documents(config.text))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"vocab_size": 256}, "vocab_size=256 must be at least 257"),
        ({"text": []}, "must name at least one source"),
        ({"text": ["a.txt", ""]}, "must name at least one source, none of them empty"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 must lie between 0 and 0.5"),
        ({"test_fraction": 0.5}, "test_fraction=0.5 must lie between 0 and 0.5"),
    ],
)
def test_wrong_settings_are_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        parse(DataConfig, raw)


def test_an_end_of_text_written_in_a_document_stays_text(tmp_path):
    texts = [*make_texts(8), "a document about <|endoftext|> tokens"]
    s = prepare(config_of(write_corpus(tmp_path / "a.jsonl", texts)), tmp_path / "s")
    assert sorted(t for split in SPLITS for t in documents_of(s, split)) == sorted(texts)
    assert sum((s.tokens(split) == 0).sum() for split in SPLITS) == len(texts) + 3


def test_training_the_tokenizer_is_deterministic_and_tiny_text_gives_fewer_tokens():
    texts = make_texts(20)
    assert train_tokenizer(texts, 400).to_str() == train_tokenizer(iter(texts), 400).to_str()
    tiny = train_tokenizer(["ab"], 5000)
    assert tiny.get_vocab_size() == 257 and tiny.token_to_id("<|endoftext|>") == 0
    text = "".join(map(chr, range(0xD800))) + "😀\r\n\t  "
    [ids] = encode_batch(tiny, [text])
    assert tiny.decode(ids.tolist(), skip_special_tokens=False) == text


def test_a_pretrained_tokenizer_is_used_as_it_is(tmp_path):
    texts = make_texts(8)
    pretrained = train_tokenizer(texts, 290)
    pretrained.enable_truncation(5)
    pretrained.add_special_tokens(["<extra>"])
    pretrained.save(str(tmp_path / "tokenizer.json"))
    path = write_corpus(tmp_path / "a.jsonl", texts)
    for n, name in enumerate((tmp_path, tmp_path / "tokenizer.json")):
        s = prepare(config_of(path, tokenizer=str(name)), tmp_path / f"s{n}")
        assert s.vocab_size == 291 and s.manifest["tokenizer"] == str(name)
        assert sorted(t for split in SPLITS for t in documents_of(s, split)) == sorted(texts)


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    texts = make_texts(4)
    vocabulary = {"</s>": 70_000} | {w: i for i, w in enumerate(sorted({c for t in texts for c in t}))}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(tmp_path / "wide.json"))
    path = write_corpus(tmp_path / "a.jsonl", texts)
    s = prepare(config_of(path, tokenizer=str(tmp_path / "wide.json")), tmp_path / "s")
    assert s.vocab_size == 70_001 and s.tokens("train").dtype == np.uint32
    assert (s.tokens("train")[s.starts("train")] == 70_000).all()


def test_an_unusable_pretrained_tokenizer_is_refused(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "endless.json"))
    path = write_corpus(tmp_path / "a.jsonl", make_texts(4))
    for name, message in (
        ("broken.json", "must be a readable tokenizer.json"),
        ("missing.json", "must be a readable tokenizer.json"),
        ("endless.json", r"has no end-of-text token; add one of <\|endoftext\|>"),
    ):
        with pytest.raises(ConfigError, match=f"tokenizer=.*{name} {message}"):
            prepare(config_of(path, tokenizer=str(tmp_path / name)), tmp_path / "s")
        assert not (tmp_path / "s").exists()
