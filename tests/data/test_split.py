import os
import random
from contextlib import ExitStack

import numpy as np
import pytest
from texts import SPLITS, config_of, documents_of, make_texts, side_by_hash, write_corpus

from sparsemix.config import ConfigError
from sparsemix.data import DataConfig, preparation, prepare
from sparsemix.data.documents import Document
from sparsemix.data.split import TEST, TRAIN, VALIDATION, Sides, split, uniform, warnings
from sparsemix.data.spool import Spool

FRACTIONS = {"validation": 0.05, "test": 0.05}


def prose(seed, num_bytes):
    """Paragraphs of made-up words, about num_bytes in all."""
    rng = random.Random(seed)
    vocabulary = [f"{rng.choice('bcdfgh')}{rng.choice('aeiou')}{i}" for i in range(500)]
    paragraphs = [" ".join(rng.choices(vocabulary, k=40)) for _ in range(max(1, num_bytes // 220))]
    return "\n\n".join(paragraphs)


def write_files(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def sides(texts, groups=None, fractions=FRACTIONS, **rule) -> tuple[Sides, np.ndarray]:
    with ExitStack() as files:
        spool = Spool(files)
        spool.add(texts)
        places = rule.pop("places", uniform(spool.hashes))
        index = np.arange(len(texts)) if groups is None else np.array(groups)
        return split(spool, index, places, fractions, **rule), spool.sizes


def shares(manifest):
    return {s: manifest["bytes"][s] / manifest["bytes_total"] for s in SPLITS}


@pytest.mark.parametrize(
    ("case", "sizes", "apart"),
    [
        ("a book and two notes", [1_000_000, 50, 60], 1),
        ("seven files, most of it in two", [200_000, 180_000, 4000, 3000, 2000, 900, 500], 1),
        ("two long and one short", [300_000, 300_000, 10], 1),
        ("novels of many lengths", [60_000 + 9_000 * i for i in range(36)], 0),
        ("three books", [50_000] * 3, 1),
        ("three short ones", [500] * 3, 0),
        ("one huge among many", [2_000_000] + [2_000] * 60, 1),
    ],
)
def test_no_corpus_is_refused_and_shares_hold_or_a_warning_says_so(case, sizes, apart):
    found, held = sides([prose(i, size) for i, size in enumerate(sizes)])
    share = found.shares(held)
    assert abs(share.sum() - 1) < 1e-9 and (share > 0).all()
    said = warnings(found, held, FRACTIONS)
    assert len(found.apart) == apart
    if case != "three short ones":
        assert said == [] or (apart and len(said) == 1 and "cut between training and held-out text" in said[0])
        assert np.abs(share - [0.9, 0.05, 0.05]).max() <= 0.1
        assert (share[[VALIDATION, TEST]] >= 0.05 / 3).all()
    else:
        # They are not worth cutting: every split gets a third, and it is said.
        assert any("of the bytes where 5.0% was asked for" in line for line in said)


def test_a_book_and_two_notes_are_prepared_and_the_manifest_says_what_was_cut(tmp_path):
    notes = {"README.md": "My library. Read me first, please.", "notes.txt": "A few notes on it, short."}
    folder = write_files(tmp_path / "in", {"book.txt": prose(1, 60_000), **notes})
    s = prepare(DataConfig(text=(folder,), vocab_size=300), tmp_path / "s")
    m = s.manifest
    assert m["documents_cut_apart"] == 1 and any("1 document is cut" in line for line in m["warnings"])
    share = shares(m)
    assert 0.85 < share["train"] < 0.95 and 0.03 < share["test"] < 0.08
    # The parts of the book have one group in every split, and together they are the book.
    of = {
        text: (split, group)
        for split in SPLITS
        for text, group in zip(documents_of(s, split), s.groups(split).tolist(), strict=True)
    }
    parts = [text for text in of if len(text) > 100]
    assert len(parts) == 3 and len({of[text][1] for text in parts}) == 1
    ordered = sorted(parts, key=prose(1, 60_000).index)
    assert "".join(ordered) == prose(1, 60_000) and [of[text][0] for text in ordered] == ["train", "validation", "test"]


def test_the_hash_of_a_text_decides_alone_where_that_gives_the_right_shares():
    texts = [f"{i} {prose(i, 400)}" for i in range(600)]
    found, _ = sides(texts)
    names = [SPLITS[side] for side in found.of]
    assert names == [side_by_hash(text, 0.05, 0.05) for text in texts] and not found.parts
    more, _ = sides(texts[:500])
    assert (more.of == found.of[:500]).all()
    wider, _ = sides(texts, fractions={"validation": 0.3, "test": 0.05})
    assert ((wider.of == TEST) == (found.of == TEST)).all()


def test_documents_of_one_group_stay_on_one_side():
    texts = [prose(i, 500 + 100 * (i % 7)) for i in range(200)]
    for size in (2, 5, 20):
        groups = [i // size for i in range(200)]
        found, _ = sides(texts, groups)
        assert all(len(set(found.of[i : i + size].tolist())) == 1 for i in range(0, 200, size))
        assert set(found.of.tolist()) == {TRAIN, VALIDATION, TEST}
    # Where all is one group, nothing can stay together, and no split is empty.
    found, held = sides(texts, [0] * 200)
    assert (found.shares(held) > 0).all()


def read_as(monkeypatch, documents):
    """Sources then hold these (name, text)."""
    monkeypatch.setattr(
        preparation, "read_documents", lambda *_: iter([Document(name, text) for name, text in documents])
    )


def test_the_parts_in_which_a_long_document_is_read_stay_on_one_side(tmp_path, monkeypatch):
    parts = [(f"{i // 4}.txt", f"{i // 4} {prose(i, 800)}") for i in range(120)]
    path = write_corpus(tmp_path / "a.jsonl", ["unread"])
    read_as(monkeypatch, parts)
    s = prepare(config_of(path), tmp_path / "s")
    of = [{text.split()[0] for text in documents_of(s, split)} for split in SPLITS]
    assert sum(map(len, of)) == 30 and sum(s.manifest["groups"].values()) == 30
    assert sum(s.manifest["documents"].values()) == 120
    # One or two documents are cut into pieces, however many parts they were read in.
    read_as(monkeypatch, parts[:8])
    s = prepare(config_of(path), tmp_path / "two")
    assert s.manifest["cut_into_pieces"] and len(set().union(*(s.groups(split).tolist() for split in SPLITS))) == 2


@pytest.mark.parametrize("script", ["的一是在不了有和人这", "กขฃคฅฆงจฉ", "abc", "é"])
def test_a_document_is_cut_between_two_characters_in_every_script(script):
    rng = random.Random(0)
    texts = ["".join(rng.choices(script, k=30_000)), "one note", "another one"]
    with ExitStack() as files:
        spool = Spool(files)
        spool.add(texts)
        found = split(spool, np.arange(3), uniform(spool.hashes), FRACTIONS)
        [parts] = found.parts.values()
        assert "".join(spool.raw(0, first, last).decode() for first, last, _ in parts) == texts[0]
        assert len(parts) == 3


def test_by_time_the_newest_are_test_and_the_oldest_train(tmp_path):
    folder = tmp_path / "in"
    write_files(folder, {f"{i:02}.txt": f"{i:02} {prose(i, 3000)}" for i in range(40)})
    for i in range(40):
        os.utime(folder / f"{i:02}.txt", (10**9, 10**9 + (i * 7 % 40) * 1000))
    s = prepare(config_of(str(folder), split="time"), tmp_path / "s")
    age = {split: sorted(int(text[:2]) * 7 % 40 for text in documents_of(s, split)) for split in SPLITS}
    assert min(age["test"]) > max(age["validation"]) and min(age["validation"]) > max(age["train"])
    assert 0.15 < shares(s.manifest)["test"] < 0.25
    with pytest.raises(ConfigError, match="split=time orders files, and hf:a/b:train:1 is none"):
        from sparsemix.data.origins import Origins

        Origins("time", ())._value("hf:a/b:train:1")


def test_by_folder_or_file_what_lies_in_one_stays_together(tmp_path):
    folder = tmp_path / "in"
    write_files(folder, {f"{'abcdefghij'[i % 10]}/deep/{i}.txt": f"{i % 10} {prose(i, 900)}" for i in range(60)})
    s = prepare(config_of(str(folder), split="folder"), tmp_path / "s")
    of = [{text.split()[0] for text in documents_of(s, split)} for split in SPLITS]
    assert sum(map(len, of)) == 10 and all(of) and s.manifest["documents_cut_apart"] == 0
    files = [write_corpus(tmp_path / f"{i}.jsonl", [f"{i} {t}" for t in make_texts(20, seed=i)]) for i in range(6)]
    config = DataConfig(text=tuple(files), vocab_size=300, validation_fraction=0.2, test_fraction=0.2, split="file")
    s = prepare(config, tmp_path / "f")
    of = [{text.split()[0] for text in documents_of(s, split)} for split in SPLITS]
    assert sum(map(len, of)) == 6 and all(of)
    for rule in ("file", "folder"):
        with pytest.raises(ConfigError, match=rf"split={rule} needs text from 3 {rule}s at least, and this is from 1"):
            prepare(config.replace(text=tuple(files[:1]), split=rule), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_two_editions_of_each_chapter_do_not_meet_across_the_split(tmp_path):
    rng = random.Random(0)
    chapters = [make_texts(6, seed=i) for i in range(40)]
    first = {f"first/{i}.txt": "".join(c) for i, c in enumerate(chapters)}
    # The second edition has another word here and there, and a new paragraph in each chapter.
    second = {
        f"second/{i}.txt": " ".join(w if rng.random() < 0.97 else "anew" for w in "".join(c).split())
        + prose(100 + i, 600)
        for i, c in enumerate(chapters)
    }
    s = prepare(config_of(write_files(tmp_path / "in", {**first, **second})), tmp_path / "s")
    assert s.manifest["duplicates_dropped"] == 0 and s.manifest["contamination"]["test"] < 0.01
    assert not any("word for word" in line for line in s.manifest["warnings"])
    assert sum(s.manifest["groups"].values()) == 40
    # The control: by a rule that parts them, the share is measured and warned of.
    apart = prepare(config_of(str(tmp_path / "in"), split="file"), tmp_path / "apart")
    measured = apart.manifest["contamination"]["test"]
    assert measured > 0.15 and any(f"{measured:.0%} of the test split" in line for line in apart.manifest["warnings"])
