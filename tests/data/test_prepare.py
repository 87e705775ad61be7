import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from texts import SPLITS, config_of, documents_of, make_texts, write_corpus
from tokenizers import Tokenizer, models

from sparsemix import durable
from sparsemix.config import ConfigError, parse
from sparsemix.data import DataConfig, Shards, preparation, prepare, write_shards
from sparsemix.data.documents import read_documents
from sparsemix.data.tokenizer import encode_batch, train_tokenizer


def test_preparing_twice_gives_identical_files(corpus, tmp_path):
    _, config, s = corpus
    prepare(config, tmp_path / "again")
    names = sorted(p.name for p in s.folder.iterdir())
    assert len(names) == 15
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (s.folder / name).read_bytes(), name


def test_finished_shards_are_reused_without_reading_the_text(corpus, monkeypatch):
    _, config, s = corpus
    monkeypatch.setattr(preparation, "_collect", lambda *_: pytest.fail("the text was read"))
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
    with pytest.raises(
        ConfigError, match=r"holds shards of the text .*; choose .*, or delete it if no run was trained"
    ):
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
    with pytest.raises(ConfigError, match=r"holds damaged shards \(train.bin has .* bytes\); delete the folder"):
        Shards.open(s.folder)
    path.unlink()
    with pytest.raises(ConfigError, match=r"holds damaged shards \(train.bin is missing\); delete the folder"):
        Shards.open(s.folder)


@pytest.mark.parametrize(
    ("file", "damaged", "said"),
    [
        ("test.starts.npy", lambda raw: b"", "has 0 of"),
        ("train.bin", lambda raw: raw[:100] + b"\xff\xff" + raw[102:], "is not what was written"),
        ("train.bin", lambda raw: raw[:100] + bytes([raw[100] ^ 1]) + raw[101:], "is not what was written"),
        ("tokenizer.json", lambda raw: raw.replace(b"0", b"1", 1), "is not what was written"),
        ("manifest.json", lambda raw: raw.replace(b'"test": ', b'"test":1', 1), "is not what was written"),
        ("checksums.json", lambda raw: raw[:-5], "checksums.json cannot be read"),
    ],
)
def test_shards_with_any_changed_byte_are_refused_and_the_file_is_named(corpus, tmp_path, file, damaged, said):
    _, config, s = corpus
    folder = shutil.copytree(s.folder, tmp_path / "s")
    path = folder / file
    path.write_bytes(damaged(path.read_bytes()))
    for opened in (Shards.open, lambda folder: prepare(config, folder)):
        with pytest.raises(
            ConfigError, match=rf"holds damaged shards \({file} .*\); delete the folder and prepare"
        ) as e:
            opened(folder)
        assert said in str(e.value)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"{file}|holds no finished shards"):
        Shards.open(folder)


@pytest.mark.parametrize(
    ("file", "damaged", "said"),
    [
        ("test.starts.npy", lambda raw: b"", "damaged shards"),
        ("train.bin", lambda raw: raw[:100] + b"\xff\xff" + raw[102:], "train.bin has an id beyond the vocabulary"),
        ("test.starts.npy", lambda raw: raw[:-8] + bytes(8), "test.starts.npy is not in order"),
        ("manifest.json", lambda raw: raw.replace(b'"vocab_size"', b'"other"', 1), "'vocab_size'"),
        ("manifest.json", lambda raw: raw[:50], "damaged shards"),
        ("manifest.json", lambda raw: b"[]", "damaged shards"),
    ],
)
def test_shards_of_earlier_versions_open_and_what_does_not_fit_together_is_told(corpus, tmp_path, file, damaged, said):
    folder = shutil.copytree(corpus[2].folder, tmp_path / "s")
    (folder / "checksums.json").unlink()
    for split in SPLITS:
        (folder / f"{split}.groups.npy").unlink()
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sealed": true', '"sealed": false'))
    assert (Shards.open(folder).groups("test") == np.arange(corpus[2].manifest["documents"]["test"])).all()
    (folder / file).write_bytes(damaged((folder / file).read_bytes()))
    with pytest.raises(ConfigError, match=said):
        Shards.open(folder)


def test_shards_are_hashed_once_in_a_process_unless_a_file_changes(corpus, tmp_path, monkeypatch):
    folder, hashed = shutil.copytree(corpus[2].folder, tmp_path / "s"), []
    real = durable.sha256_of
    monkeypatch.setattr(durable, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    for _ in range(3):
        Shards.open(folder)
    assert sorted(hashed) == sorted(p.name for p in folder.iterdir() if p.name != "checksums.json")
    os.utime(folder / "train.bin", (1, 1))
    Shards.open(folder)
    assert len(hashed) == 2 * (len(list(folder.iterdir())) - 1)


def test_where_the_shards_go_is_tried_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "read_documents", lambda *_: pytest.fail("the text was read"))
    config = config_of(write_corpus(tmp_path / "a.jsonl", make_texts(8)))
    for place in (tmp_path / "a.jsonl" / "s", tmp_path / ("n" * 300), "/proc/nothing/s"):
        with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another folder"):
            prepare(config, Path(place))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_killed_preparation_leaves_nothing_at_the_folder(corpus, tmp_path):
    _, config, s = corpus
    script = """
import os, signal, sys
from pathlib import Path
from sparsemix.data import DataConfig, prepare, write_shards
write, calls = write_shards.write_stream, []
def kill(tokenizer, texts, path, on_text):
    calls.append(path)
    return write(tokenizer, texts, path, on_text) if len(calls) < 2 else os.kill(os.getpid(), signal.SIGKILL)
write_shards.write_stream = kill
prepare(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""
    folder = tmp_path / "out" / "s"
    done = subprocess.run([sys.executable, "-c", script, config.model_dump_json(), str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name[-8:] for p in folder.parent.iterdir()) == [".partial", "al.guard"]
    assert prepare(config, folder).manifest == s.manifest
    assert [p.name for p in folder.parent.iterdir()] == ["s"]


def test_an_interrupted_preparation_cleans_up(corpus, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write_shards, "write_stream", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus[1], tmp_path / "out" / "s")
    assert not (tmp_path / "out").exists()


def test_two_preparations_of_one_folder_agree(corpus, tmp_path, monkeypatch):
    _, config, s = corpus
    folder, write = tmp_path / "s", write_shards.write_stream

    def other_process_finishes_first(tokenizer, texts, path, on_text):
        monkeypatch.setattr(write_shards, "write_stream", write)
        prepare(config, folder)
        return write(tokenizer, texts, path, on_text)

    monkeypatch.setattr(write_shards, "write_stream", other_process_finishes_first)
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
    texts = sorted(make_texts(12, seed=seed), key=len)[-3:]
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
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == [
        "reading",
        "training the tokenizer",
        "tokenizing",
        "looking for held-out text in train",
    ]
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
