"""The cache of compiled kernels holds code that runs: what is damaged, or could be another's, does not."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sparsemix.ops import build, native
from sparsemix.ops.statements import KERNELS

SOURCE = """#include <stdint.h>
void twice(const float *x, float *y, int64_t n, int64_t threads) { for (int64_t i = 0; i < n; i++) y[i] = 2 * x[i]; }
static void helper(float *y, int64_t threads) { *y = 0; }
void zero(float *y, int64_t threads) { helper(y, threads); }
"""
STATEMENT = ("doubling.twice", "x:f32[n] y:f32[n] n")
KERNEL = "void twice(float *y, int64_t threads) {"
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
OTHER = 12345


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPARSEMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(KERNELS, *STATEMENT)
    path = tmp_path / "doubling" / "native.c"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture
def cache(source) -> Path:
    return source.parent.parent / "cache"


def refusal(source: Path) -> str:
    """Why PyTorch's kernels run, as the warning says it: in one line."""
    forget()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        why = build.unusable(source)
    assert why is not None
    assert [str(warning.message) for warning in said] == [
        f"{why}; PyTorch's slower kernels run instead (sparsemix doctor)"
    ]
    assert "\n" not in why
    return why


def forget():
    """As a new process would start."""
    build._loaded.cache_clear()
    build._built.cache_clear()


def runs(source: Path) -> bool:
    forget()
    y = torch.zeros(3)
    assert build.unusable(source) is None
    native.call(source, "twice", torch.ones(3), y, 3)
    return y.tolist() == [2, 2, 2]


def compiler_that(folder: Path, writes: str, shows: str = KERNEL) -> str:
    """A compiler whose output is what the shell command `writes` puts into "$out"; -E prints `shows`."""
    path = folder / f"cc{len(list(folder.glob('cc*')))}"
    path.write_text(f"""#!/bin/sh
for word; do
    [ "$word" = -E ] && echo '{shows}' && exit
    [ "$last" = -o ] && out=$word
    last=$word
done
{writes}
""")
    path.chmod(0o755)
    return str(path)


MUTATE = """
import os, random, sys
from pathlib import Path
import test_build as t
t.KERNELS.update([t.STATEMENT])
source, (library,) = Path(sys.argv[1]), Path(sys.argv[2]).glob("*.so")
whole, draw = library.read_bytes(), random.Random(0)
cut = [whole[:n] for n in (0, 1, 64, 4096, len(whole) // 2, len(whole) - 1)]
flipped = [draw.sample(range(len(whole)), 3) for _ in range(24)]
for i, damaged in enumerate([*cut, *flipped]):
    if isinstance(damaged, list):
        damaged = bytes(byte ^ 1 << draw.randrange(8) if at in damaged else byte for at, byte in enumerate(whole))
    library.write_bytes(damaged)
    assert t.runs(source), i
    assert library.read_bytes() == whole, i
    # What runs is a copy: the file may lose its pages now.
    library.write_bytes(b"")
    assert t.native.call(source, "twice", *(t.torch.ones(3),) * 2, 3) is None
print("all rebuilt")
"""


@needs_compiler
def test_every_flipped_bit_and_every_cut_is_found_and_built_anew(source, cache, monkeypatch, tmp_path):
    assert runs(source)
    (first,) = cache.glob("*.so")
    (tmp_path / "good").write_bytes(first.read_bytes())
    first.unlink()
    # A build takes a copy here, so that there can be many.
    monkeypatch.setenv("SPARSEMIX_CC", compiler_that(tmp_path, f'cp {tmp_path}/good "$out"'))
    assert runs(source)
    # In a process of its own: code that is damaged may end it.
    done = subprocess.run(
        [sys.executable, "-c", MUTATE, str(source), str(cache)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (0, "all rebuilt\n"), done.stderr


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's format of libraries")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_part_of_a_library_that_has_the_name_of_its_content_is_built_anew(source, cache, share):
    assert runs(source)
    (whole,) = cache.glob("*.so")
    content = whole.read_bytes()
    part = content[: int(share * len(content))]
    whole.rename(cache / build.file_name(whole.name.rpartition("-")[0], part))
    next(cache.glob("*.so")).write_bytes(part)
    assert runs(source)
    assert [path.read_bytes() for path in cache.glob("*.so")] == [content]


@pytest.mark.parametrize("thing", ["folder", "link", "pipe"])
def test_what_is_no_file_in_its_place_is_never_opened(source, cache, thing, tmp_path):
    cache.mkdir(mode=0o700)
    path = cache / "a-0.so"
    {"folder": path.mkdir, "link": lambda: path.symlink_to(__file__), "pipe": lambda: os.mkfifo(path)}[thing]()
    if thing == "folder":
        with pytest.raises(OSError, match=str(path)):
            build.stored(cache, "a")
    else:
        assert build.stored(cache, "a") is None
        assert not path.is_symlink() and not path.exists()


@pytest.mark.parametrize(
    ("writes", "said"),
    [
        ("true", "wrote no library for doubling"),
        (': > "$out"', "wrote no library for doubling, but an empty file"),
        ('echo hello > "$out"', "wrote no library for doubling, but a file of another kind"),
        ('head -c 3 "$good" > "$out"', "wrote no library for doubling, but a file of another kind"),
        ('head -c 40 "$good" > "$out"', "wrote no library for doubling, but the first 40 bytes of one"),
        ('head -c 9000 "$good" > "$out"', "wrote no library for doubling, but the first 9000 of"),
        ("echo the disk is full >&2; exit 1", "cannot build doubling: the disk is full"),
        ("kill -9 $$", "cannot build doubling: exit code -9"),
    ],
)
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's format of libraries")
def test_a_compiler_that_writes_no_library_is_named_and_nothing_is_kept(
    source, cache, monkeypatch, tmp_path, writes, said
):
    content, kernels = build.compile_source(source, str(build.compiler()), build.COMMON)
    assert kernels == ["twice", "zero"]
    (tmp_path / "good").write_bytes(content)
    monkeypatch.setenv("SPARSEMIX_CC", compiler_that(tmp_path, f"good={tmp_path}/good\n{writes}"))
    assert said in refusal(source)
    assert list(cache.iterdir()) == []


@needs_compiler
def test_a_library_without_one_of_its_kernels_is_named_and_not_kept(source, cache, monkeypatch, tmp_path):
    content, _ = build.compile_source(source, str(build.compiler()), build.COMMON)
    (tmp_path / "good").write_bytes(content)
    lacking = compiler_that(tmp_path, f'cp {tmp_path}/good "$out"', f"{KERNEL} }} void thrice(int64_t threads) {{ }}")
    monkeypatch.setenv("SPARSEMIX_CC", lacking)
    assert refusal(source) == f"{lacking} built doubling without thrice"
    assert list(cache.iterdir()) == []


def test_a_compiler_that_is_not_there_is_named(source, monkeypatch):
    monkeypatch.setenv("SPARSEMIX_CC", "no-such-cc")
    assert refusal(source) == "SPARSEMIX_CC=no-such-cc is no program that can be run"


@needs_compiler
def test_folder_and_library_are_for_their_user_alone_under_any_mask(source, cache, monkeypatch, tmp_path):
    deep = tmp_path / "a" / "b" / "cache"
    monkeypatch.setenv("SPARSEMIX_CACHE", str(deep))
    mask = os.umask(0)
    try:
        assert runs(source)
    finally:
        os.umask(mask)
    (library,) = deep.iterdir()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (deep.parent.parent, deep.parent, deep, library)]
    assert modes == [0o700, 0o700, 0o700, 0o600]
    assert runs(source)


@needs_compiler
@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_folder_that_others_may_write_is_refused_and_said(source, cache, monkeypatch, tmp_path, above):
    folder = tmp_path / "a" / "b" / "cache"
    monkeypatch.setenv("SPARSEMIX_CACHE", str(folder))
    assert runs(source)
    wide = [folder, *folder.parents][above]
    wide.chmod(0o777)
    why = refusal(source)
    assert why.startswith(f"kernels in {folder} are not run: {wide} can be written by others (mode 0777)")
    assert "SPARSEMIX_CACHE names another folder" in why
    # As /tmp: nobody renames what is another's; but anybody may put a file there.
    wide.chmod(0o1777)
    assert runs(source) if above else "can be written by others" in refusal(source)


@needs_root
@needs_compiler
@pytest.mark.parametrize("whose", ["folder", "parent", "library", "link"])
def test_another_users_folder_or_library_is_not_run(source, cache, monkeypatch, tmp_path, whose):
    folder = tmp_path / "a" / "cache"
    monkeypatch.setenv("SPARSEMIX_CACHE", str(folder))
    assert runs(source)
    (library,) = folder.iterdir()
    if whose == "link":
        (tmp_path / "link").symlink_to(tmp_path / "a")
        monkeypatch.setenv("SPARSEMIX_CACHE", str(tmp_path / "link" / "cache"))
        assert runs(source)
    foreign = {"folder": folder, "parent": folder.parent, "library": library, "link": tmp_path / "link"}[whose]
    os.chown(foreign, OTHER, OTHER, follow_symlinks=False)
    said = "it is another user's; delete it" if whose == "library" else f"is of user {OTHER}, not of root"
    assert f"{foreign} is" in (why := refusal(source))
    assert said in why


@needs_compiler
def test_a_library_that_others_may_write_is_not_run(source, cache):
    assert runs(source)
    (library,) = cache.iterdir()
    library.chmod(0o622)
    assert f"{library} is not run: it can be written by others" in refusal(source)


def test_a_group_of_its_owner_alone_may_write(tmp_path, monkeypatch):
    status = os.stat_result((0o100664, 0, 0, 1, 7, 7, 0, 0, 0, 0))
    for members, name, wide in [
        ([], "ann", False),
        (["ann"], "ann", False),
        (["ann", "bob"], "ann", True),
        ([], "g", True),
    ]:
        build.trust._of_one.cache_clear()
        monkeypatch.setattr("grp.getgrgid", lambda gid, n=name, m=members: type("G", (), {"gr_name": n, "gr_mem": m}))
        monkeypatch.setattr("pwd.getpwuid", lambda uid: type("U", (), {"pw_name": "ann"}))
        assert build.trust.others_write(status) == wide, (members, name)
    build.trust._of_one.cache_clear()


@needs_compiler
def test_a_user_without_a_home_is_told_of_the_other_folder(source, monkeypatch):
    for name in ("SPARSEMIX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict[int, str]().__getitem__)
    assert refusal(source).startswith("this user has no home folder")


@needs_compiler
def test_a_home_that_cannot_be_written_is_named(source, monkeypatch):
    monkeypatch.setenv("SPARSEMIX_CACHE", "/proc/no/cache")
    assert refusal(source).startswith("/proc/no/cache cannot be made (")


def test_the_files_of_an_unmapped_root_are_trusted_above_the_folder_only(monkeypatch, tmp_path):
    (tmp_path / "map").write_text("      1000       1000          1\n")
    (tmp_path / "overflow").write_text("65534\n")
    monkeypatch.setattr(build.trust, "UID_MAP", tmp_path / "map")
    monkeypatch.setattr(build.trust, "OVERFLOW", tmp_path / "overflow")
    assert build.trust._roots_unmapped(65534)
    assert not build.trust._roots_unmapped(1001)
    (tmp_path / "map").write_text("         0          0 4294967295\n")
    assert not build.trust._roots_unmapped(65534)


@pytest.mark.parametrize("op", sorted(path.parent.name for path in build.HEADERS.glob("*/native.c")))
@needs_compiler
def test_the_kernels_of_an_op_are_read_from_its_source(op):
    path = build.HEADERS / op / "native.c"
    shown = build._run([str(build.compiler()), f"-I{build.HEADERS}", str(path), "-E", "-P"], op)
    kernels = build.KERNEL.findall(shown)
    assert kernels
    assert build.unusable(path) is None
    assert all(hasattr(build.library(path), kernel) for kernel in kernels)
