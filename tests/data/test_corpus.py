import gzip
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import zstandard

from sparsemix.config import ConfigError
from sparsemix.data.documents import read_documents

TEXTS = ["first text\nwith two lines", "zweiter Text: äöü €", "third"]
LINES = "\n".join(json.dumps({"text": t, "id": i}) for i, t in enumerate(TEXTS))


def texts(*sources):
    return [d.text for d in read_documents([str(s) for s in sources])]


def words(seed, n):
    return [f"w{random.Random(seed * 100003 + i).randrange(5000)}" for i in range(n)]


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(rows), path)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_plain_file_is_one_document_unchanged(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(TEXTS[0].encode() + b"\r\n\n")
    assert texts(path) == [TEXTS[0] + "\r\n\n"]


def test_jsonl_plain_gzip_zstandard_and_parquet_hold_the_same_documents(tmp_path):
    raw = LINES.encode()
    half = len(raw) // 2
    frames = [zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:])]
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[:half]) + gzip.compress(raw[half:]))
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    write_parquet(tmp_path / "d.parquet", {"id": [0, 1, 2], "text": TEXTS})
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert texts(tmp_path / name) == TEXTS, name


def test_lines_longer_than_a_read_chunk_stay_whole(tmp_path):
    long = ["a" * 1_048_575, "b" * (1 << 20)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in long) + "\n\n")
    assert texts(tmp_path / "a.jsonl") == long


def test_a_folder_is_read_recursively_in_sorted_order_without_hidden_and_foreign_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/c.png", ".git/x.txt", "__pycache__/y.py", ".hidden.txt", "c.JSONL"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name == "c.JSONL" else name)
    assert texts(tmp_path) == ["a/z.md", "b.txt", "c.JSONL"]


def test_a_glob_works_absolute_and_relative(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "sub/c.txt", "d.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    assert texts(tmp_path / "*.txt") == texts("*.txt") == texts("[ab].*") == ["a.txt", "b.txt"]
    assert texts("**/c.*") == ["sub/c.txt"]


def test_stdlib_is_pythons_own_sources_without_tests():
    documents = list(read_documents(["stdlib"]))
    root = Path(sysconfig.get_path("stdlib"))
    names = {Path(d.name).relative_to(root).as_posix() for d in documents}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any({"test", "tests", "encodings", "site-packages"} & set(Path(name).parts) for name in names)
    assert sum(len(d.text) for d in documents) > 5_000_000


def test_progress_counts_the_bytes_of_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    seen = []
    list(read_documents([str(tmp_path / "a.jsonl")], seen.append))
    assert seen == list(np.cumsum([len(t.encode()) for t in TEXTS]))


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n\n{"text": "x"}')
    assert texts(tmp_path / "a.jsonl") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "a.csv: unknown suffix '.csv' (looks like text, --text-as .csv reads it); rename"),
        ("a.json.gz", b"x", "unknown suffix '.gz' (looks"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8 at byte 3; convert"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', "a.jsonl is not UTF-8 at byte 25"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'["text"]', "a.jsonl:1 is a JSON list; it must be an object with a field `text`"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"id": 1, "body": "x"}', "a.jsonl:3: no field `text` (fields: id, body)"),
        ("a.jsonl", b'{"text": null}', "every document is empty (skipped: 1 row (`text` is null, "),
        ("a.jsonl", b'{"text": "a\\ud800"}', "a.jsonl:1: `text` has a lone surrogate at character 1"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], "a.jsonl.gz is truncated or corrupt"),
        ("a.jsonl.gz", b"not gzip at all", "a.jsonl.gz is truncated or corrupt"),
        ("a.jsonl.zst", zstandard.compress(LINES.encode())[:-4], "a.jsonl.zst is truncated or corrupt"),
        ("a.jsonl.zst", b"not zstandard", "a.jsonl.zst is truncated or corrupt"),
        ("a.parquet", b"PAR1 not parquet PAR1", "a.parquet is truncated or corrupt"),
        ("a.txt", b" \n", "holds no text: every document is empty"),
    ],
    # gzip writes the time, and pytest-xdist needs the same names in every worker.
    ids=lambda value: "bytes" if isinstance(value, bytes) else value,
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        texts(tmp_path / name)
    assert message in str(error.value)
    assert "; " in str(error.value)
    assert "\n" not in str(error.value)


def test_corrupt_bytes_inside_gzip_are_reported(tmp_path):
    raw = bytearray(gzip.compress(bytes(random.Random(0).randbytes(5000))))
    raw[2000] ^= 255
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz is (truncated or corrupt|not UTF-8)"):
        texts(tmp_path / "a.jsonl.gz")


def test_parquet_without_the_text_column_names_its_fields(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"id": [1], "body": ["x"]})
    with pytest.raises(ConfigError, match=r"a\.parquet:1: no field `text` \(fields: id, body\)"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.txt", "none.txt: no such file or folder; give"),
        ("*.txt", "*.txt: the glob matches no supported file"),
        ("a**b/*.txt", "a**b/*.txt"),
        ("empty", "empty: the folder holds no supported file; put"),
    ],
)
def test_a_missing_source_is_reported_before_any_text_is_read(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("good.md").write_text("good")
    with pytest.raises(ConfigError) as error:
        next(read_documents(["good.md", source]))
    assert message in str(error.value)


def test_hub_names_are_read_by_the_stated_rule(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    calls = []

    def fake(*which, split, streaming):
        calls.append((*which, split, streaming))
        if which == ("wikitext/wikitext-2-raw-v1",):
            raise DatasetNotFoundError("not on the Hub")
        return [{"text": "hello"}, {"text": "world"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    for source in ("hf:imdb:test", "hf:o/n:train", "hf:wikitext/wikitext-2-raw-v1:train", "hf:o/n/c:validation"):
        assert texts(source) == ["hello", "world"]
    assert calls == [
        ("imdb", "test", True),
        ("o/n", "train", True),
        ("wikitext/wikitext-2-raw-v1", "train", True),
        ("wikitext", "wikitext-2-raw-v1", "train", True),
        ("o/n", "c", "validation", True),
    ]


def test_a_hub_data_set_that_fails_is_one_line(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"^hf:o/n:train cannot be streamed \(Couldn't reach the Hub\); check"):
        texts("hf:o/n:train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"content": "x"}])
    with pytest.raises(ConfigError, match=r"^hf:o/n:train:1: no field `text` \(fields: content\)"):
        texts("hf:o/n:train")
    for bad in ("hf:imdb", "hf:a/b/c/d:train", "hf:a//b:train", "hf::train"):
        with pytest.raises(ConfigError, match="must look like hf:NAME:SPLIT"):
            texts(bad)
