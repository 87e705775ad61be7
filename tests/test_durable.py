"""Files and folders that are there whole or not at all."""

import json
import os
import signal
import subprocess
import sys

import pytest

from sparsemix import durable


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.json"
    for content in ("one", b"two"):
        durable.write_atomic(path, content)
    assert path.read_text() == "two"
    assert names(tmp_path) == ["a.json"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    durable.write_atomic(path, "old")
    with pytest.raises(RuntimeError), durable.aside(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_folder_appears_whole(tmp_path):
    with durable.aside(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "x").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "x").read_text() == "1"


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        durable.write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


LIVING = """
import sys, time; from pathlib import Path; from sparsemix import durable
with durable.aside(Path(sys.argv[1])) as temporary:
    temporary.write_text("half"); print("ready", flush=True); time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks that end with their process")
def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "[a]*.json"
    process = subprocess.Popen([sys.executable, "-c", LIVING, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    durable.write_atomic(path, "mine")
    assert len(names(tmp_path)) == 3  # the living one's file and its guard
    process.send_signal(signal.SIGKILL)
    process.communicate()
    durable.write_atomic(path, "mine again")
    assert names(tmp_path) == [path.name]


def sealed(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "b.txt").write_text("b")
    durable.seal(tmp_path)
    return tmp_path


def test_a_sealed_folder_is_undamaged(tmp_path):
    assert durable.damage(sealed(tmp_path)) is None


def test_every_flipped_bit_cut_or_missing_file_is_named(tmp_path):
    path = sealed(tmp_path) / "deep" / "a.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert durable.damage(tmp_path) == "deep/a.bin is not what was written"
    path.write_bytes(good[:7])
    assert durable.damage(tmp_path) == "deep/a.bin has 7 of 256 bytes"
    path.unlink()
    assert durable.damage(tmp_path) == "deep/a.bin is missing"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"b.txt": 3}', json.dumps({"b.txt": {"bytes": 1}})])
def test_a_damaged_seal_is_damage(tmp_path, content):
    (sealed(tmp_path) / durable.SEAL).write_text(content)
    assert durable.damage(tmp_path) == "checksums.json cannot be read"
    (tmp_path / durable.SEAL).unlink()
    assert durable.damage(tmp_path) == "it has no checksums.json"


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask_whoever_made_them(tmp_path, umask):
    """safetensors and tempfile make files that their owner alone may read."""
    before = os.umask(umask)
    try:
        with durable.aside(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "private").touch(mode=0o600)
            (temporary / "program").touch(mode=0o700)
        with durable.aside(tmp_path / "file") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    usual = 0o666 & ~umask
    assert modes == {"private": usual, "program": usual | 0o700, "file": usual}


def test_half_a_letter_in_a_text_is_written_as_its_escape(tmp_path):
    durable.write_atomic(tmp_path / "a.html", "caf\udce9")
    assert (tmp_path / "a.html").read_bytes() == b"caf\\udce9"
