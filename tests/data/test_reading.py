"""What lies in people's folders and files is read, or left out with its reason."""

import json
import os
import socket
import tracemalloc

import pytest

from sparsemix.config import ConfigError, parse
from sparsemix.data import DataConfig, Tally, prepare, read_documents, rows
from sparsemix.data.documents import MAX_CHARS
from sparsemix.data.tokenizer import train_tokenizer


def read(*sources, text_as=()):
    """(names and texts, the tally as a dictionary)."""
    tally = Tally()
    found = [(d.name, d.text) for d in read_documents([str(s) for s in sources], None, text_as, tally)]
    return found, tally.as_dict()


def texts(*sources, text_as=()):
    return [text for _, text in read(*sources, text_as=text_as)[0]]


def skipped(*sources):
    """kind -> (how many, why)."""
    return {entry["kind"]: (entry["count"], entry["why"]) for entry in read(*sources)[1]["skipped"]}


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with one text in it."""
    made = tmp_path / "texts"
    made.mkdir()
    (made / "a.txt").write_text("a text")
    return made


def test_links_that_lead_nowhere_and_special_files_are_skipped_with_their_reason(folder):
    (folder / "gone.txt").symlink_to("/nowhere/x.txt")
    (folder / "self.txt").symlink_to(folder / "self.txt")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket.txt"))
    for source in (folder, folder / "*", folder.parent / "**" / "*.txt"):
        assert texts(source) == ["a text"]
        assert skipped(source) == {
            "link": (2, "leads nowhere"),
            "FIFO": (1, "no file of text"),
            "socket": (1, "no file of text"),
        }


def test_a_special_file_or_a_dangling_link_named_itself_is_refused(folder):
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to("/nowhere/x.txt")
    with pytest.raises(ConfigError, match=r"pipe\.txt is a FIFO, which can be read only once; write its text to a"):
        texts(folder / "pipe.txt")
    with pytest.raises(ConfigError, match=r"gone\.txt is a link that leads nowhere; mend it"):
        texts(folder / "gone.txt")
    with pytest.raises(ConfigError, match=r"cannot be read \(File name too long\)"):
        texts("x" * 300)


def test_linked_folders_are_read_and_each_folder_once(folder, tmp_path):
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    (other / "b.txt").write_text("b text")
    (other / "deep" / "c.txt").write_text("c text")
    (other / "deep" / "back").symlink_to(folder)
    (folder / "more").symlink_to(other)
    (folder / "again").symlink_to(other / "deep")
    for source in (folder, folder / "**" / "*.txt", folder / "**"):
        assert sorted(texts(source)) == ["a text", "b text", "c text"]
    assert skipped(folder)["linked folder"] == (2, "is read by another name")


def test_a_folder_below_that_cannot_be_opened_and_a_file_that_may_not_be_read_are_said(folder, monkeypatch):
    (folder / "closed").mkdir()
    (folder / "mine.txt").write_text("x")
    scan, access = os.scandir, os.access

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    # Root may read everything.
    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: "mine" not in str(path) and access(path, mode))
    assert skipped(folder) == {"folder": (1, "Permission denied"), ".txt": (1, "no permission to read it")}
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"texts cannot be read \(Permission denied\); mend it, or name another"):
        texts(folder)


def test_file_names_that_are_not_utf8_are_read_and_can_be_printed(folder, tmp_path):
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"text {i}")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("coffee")
    (name,) = [name for name, text in read(folder)[0] if text == "coffee"]
    assert name.endswith(r"caf\xe9.txt") and name.encode()
    config = DataConfig(text=(str(folder),), vocab_size=300)
    assert sum(prepare(config, tmp_path / "shards").manifest["documents"].values()) == 6
    write_parquet(tmp_path / "a.parquet", {"text": ["p"]}).rename(tmp_path / os.fsdecode(b"\xff.parquet"))
    assert texts(tmp_path / os.fsdecode(b"\xff.parquet")) == ["p"]


def test_files_of_unknown_suffix_are_counted_by_what_they_hold_and_read_by_asking(folder):
    for i in range(20):
        (folder / f"{i}.ASC").write_text(f"chapter {i}")
    (folder / "latin.htm").write_bytes("Grüße".encode("latin-1"))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / "cut.log").write_bytes("ä".encode() * 5000)
    (folder / "LICENSE").write_text("do what you like")
    (folder / ".git").mkdir()
    (folder / "__pycache__").mkdir()
    assert skipped(folder) == {
        ".asc": (20, "looks like text, --text-as .asc reads it"),
        ".htm": (1, "looks like text but not UTF-8, convert it"),
        ".png": (1, "not text"),
        ".log": (1, "looks like text, --text-as .log reads it"),
        "without suffix": (1, "looks like text, --text-as . reads it"),
        "hidden": (1, "name begins with a dot"),
        "__pycache__": (1, "never read"),
    }
    assert len(texts(folder, text_as=(".asc",))) == 21
    assert texts(folder, text_as=(".",)) == ["do what you like", "a text"]
    assert texts(folder / "3.ASC", text_as=(".asc",)) == ["chapter 3"]
    with pytest.raises(ConfigError, match=r"only\.asc: .*'\.asc' \(looks like text, --text-as \.asc reads it\)"):
        (folder / "only.asc").write_text("x")
        texts(folder / "only.asc")
    with pytest.raises(ConfigError, match=r"glob matches no supported file \(skipped: 21 \.asc \(looks like"):
        texts(folder / "*.[aA][sS][cC]")


@pytest.mark.parametrize("suffix", ["asc", ".JSONL", ".gz", ".txt", "", "./x"])
def test_only_suffixes_that_change_something_can_be_read_as_text(suffix):
    with pytest.raises(ConfigError, match=r"text_as=.* must (be suffixes that begin with a dot|not name \.)"):
        parse(DataConfig, {"text_as": [suffix]})


def test_the_line_says_how_much_was_read_and_what_was_skipped(folder, tmp_path):
    (folder / "b.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": " "}\nnull\n{"text": "two"}\n')
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"\0")
    told = read(folder)[1]
    assert told["line"] == (
        "read: 2 files, 13 bytes, 3 documents, duplicates kept; skipped: 3 .png (not text, such as "
        f"{folder}/0.png), 1 row (`text` is null, {folder}/b.jsonl:2), 1 document (only white space, "
        f"{folder}/b.jsonl:3), 1 row (null, {folder}/b.jsonl:4)"
    )
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": f"text {i // 2}"}) for i in range(12)))
    read_ = prepare(DataConfig(text=(str(folder),), vocab_size=300), tmp_path / "shards").manifest["read"]
    assert (read_["files"], read_["documents"], read_["duplicates"], read_["bytes"]) == (2, 13, 6, 6 + 12 * 6)
    assert "13 documents, 6 duplicates dropped; skipped: 3 .png" in read_["line"]


def test_reading_that_stops_early_says_how_many_files_it_saw(folder):
    (folder / "b.txt").write_text("b")
    tally = Tally()
    next(iter(read_documents([str(folder)], None, (), tally)))
    assert tally.line().startswith("read: 1 of 2 files, 6 bytes, 1 document, ")


def test_byte_order_marks_are_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"text")
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "one"}\n' + mark + b'{"text": "two"}')
    assert texts(tmp_path / "a.txt", tmp_path / "b.jsonl") == ["text", "one", "two"]
    for name in ("c.txt", "d.jsonl"):
        (tmp_path / name).write_bytes('{"text": "x"}\n'.encode("utf-16"))
        with pytest.raises(ConfigError, match=r"is UTF-16, not UTF-8 at byte 0; convert it"):
            texts(tmp_path / name)


def test_the_byte_that_is_not_utf8_is_named_wherever_reads_cut_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    for size in range(1, 9):
        monkeypatch.setattr(rows, "_CHUNK", size)
        path.write_bytes("aé€😀".encode() + b"\xff")
        with pytest.raises(ConfigError, match="not UTF-8 at byte 10;"):
            texts(path)
        path.write_bytes("aé€😀".encode()[:-1])
        with pytest.raises(ConfigError, match="not UTF-8 at byte 6;"):
            texts(path)
        path.write_bytes("aé€😀".encode())
        assert texts(path) == ["aé€😀"]


def test_lines_are_the_same_wherever_reads_cut_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "bb"}\r\n{"text": "c"}')
    whole = read(path)[0]
    assert [text for _, text in whole] == ["a", "bb", "c"]
    for size in range(1, 40):
        monkeypatch.setattr(rows, "_CHUNK", size)
        assert read(path)[0] == whole


def test_a_line_above_the_stated_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b" * (1 << 22)}))
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 2 is longer than 1 MiB, and a line is one document; put"):
        texts(tmp_path / "a.jsonl")


def test_long_documents_come_in_parts_that_make_up_the_same(tmp_path):
    paragraph = "word " * 30 + "end.\n\n"
    long = paragraph * (2 * MAX_CHARS // len(paragraph))
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * (MAX_CHARS + 1)}) + '\n{"text": "short"}')
    found, told = read(tmp_path)
    book = [text for name, text in found if name.endswith("a.txt")]
    assert "".join(book) == long and all(text.endswith("end.\n\n") for text in book)
    assert len(book) == 3 and max(map(len, book)) <= MAX_CHARS
    line = [text for name, text in found if name.endswith("b.jsonl:1")]
    assert list(map(len, line)) == [MAX_CHARS, 1]
    assert told["cut"] == 2 and "2 long ones cut" in told["line"]


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_cutting_loses_nothing_and_keeps_to_its_size(size):
    text = "one two\nthree\n\nfour  five" * 7
    for step in (1, 3, 1000):
        parts = list(rows.cut((text[i : i + step] for i in range(0, len(text), step)), size))
        assert "".join(parts) == text and max(map(len, parts)) <= size


def test_one_document_at_a_time_is_in_memory(tmp_path):
    # As a book without an end, and as many short documents.
    (tmp_path / "a.txt").write_text("word " * 2_500_000)
    (tmp_path / "b.jsonl").write_text((json.dumps({"text": "word " * 20_000}) + "\n") * 120)
    tracemalloc.start()
    try:
        for _ in read_documents([str(tmp_path)]):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_CHARS
    finally:
        tracemalloc.stop()


def test_parquet_text_may_be_bytes_categories_or_large_strings(tmp_path):
    import pyarrow

    wanted = ["one", "zwei ä", None, "three"]
    for kind in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.large_string(), pyarrow.string()):
        assert texts(write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array(wanted).cast(kind)})) == [
            "one",
            "zwei ä",
            "three",
        ]
    packed = pyarrow.array(wanted).dictionary_encode()
    assert texts(write_parquet(tmp_path / "a.parquet", {"text": packed})) == ["one", "zwei ä", "three"]
    assert skipped(tmp_path)["row"] == (1, "`text` is null")


def test_parquet_bytes_that_are_not_utf8_are_named_by_row(tmp_path):
    import pyarrow

    values = pyarrow.array([b"fine", b"caf\xe9"])
    for column in (values, values.view(pyarrow.string())):
        write_parquet(tmp_path / "a.parquet", {"text": column})
        with pytest.raises(ConfigError, match=r"a\.parquet:2: `text` is not UTF-8 at its byte 3; convert it"):
            texts(tmp_path / "a.parquet")


def test_parquet_columns_that_nobody_asked_for_are_not_converted(tmp_path):
    import pyarrow

    days = pyarrow.array([2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())
    broken = pyarrow.array([b"\xff"]).view(pyarrow.string())
    assert texts(write_parquet(tmp_path / "a.parquet", {"day": days, "bad": broken, "text": ["x"]})) == ["x"]
    write_parquet(tmp_path / "b.parquet", {"day": days, "bad": broken, "body": ["x"]})
    with pytest.raises(ConfigError, match=r"b\.parquet:1: no field `text` \(fields: day, bad, body\); rename"):
        texts(tmp_path / "b.parquet")
    write_parquet(tmp_path / "c.parquet", {"text": days})
    with pytest.raises(ConfigError, match=r"c\.parquet: `text` is date32\[day\], not a string"):
        texts(tmp_path / "c.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], ["text", "text"])
    write_parquet(tmp_path / "e.parquet", twice)
    with pytest.raises(ConfigError, match=r"e\.parquet: there are two fields `text`; rename"):
        texts(tmp_path / "e.parquet")
    inner = pyarrow.StructArray.from_arrays([pyarrow.array(["set"]), days], ["name", "day"])
    path = write_parquet(tmp_path / "d.parquet", {"text": ["x"], "meta": inner})
    (row,) = rows.read_rows([path], ("text", "meta.name", "gone"))
    assert row.fields == {"text": "x", "meta": {"name": "set"}}


def test_a_word_without_end_is_counted_in_pieces():
    for run in ("a", " ", "\n", "ab"):
        tokenizer = train_tokenizer([run * 50_000, "some other words"], 400)
        assert max(len(token) for token in tokenizer.get_vocab() if token != "<|endoftext|>") <= 256
        assert tokenizer.decode(tokenizer.encode(run * 1000).ids) == run * 1000


def test_every_kind_that_is_left_out_is_named_and_what_could_be_read_comes_first():
    tally = Tally()
    for i in range(30):
        for _ in range(30 - i):
            tally.skip(f".k{i}", "not text", f"a.k{i}")
    tally.skip(".asc", "looks like text, --text-as .asc reads it", "c0.asc")
    said = tally.skips()
    assert said.startswith("skipped: 1 .asc (looks like text, --text-as .asc reads it, c0.asc), 30 .k0 (not text")
    assert all(f" .k{i}" in said for i in range(17))
    assert said.endswith(", 91 of 13 more kinds")
