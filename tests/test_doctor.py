"""`sparsemix doctor`: what this machine runs, and the way out where it could be faster."""

from pathlib import Path

import pytest

from commands import call
from sparsemix.doctor import _cache, all_kernels, examine
from sparsemix.ops.impl import Kernels


def found(what: str):
    return next(finding for finding in examine() if finding.what == what)


def test_every_op_is_examined():
    names = {finding.what for finding in examine()}
    assert {"C compiler", "instruction set", "threads", "huge pages"} < names
    assert {kernels.op for kernels in all_kernels()} < names
    assert {"row_dot", "row_mix"} <= names


@pytest.mark.parametrize(("two", "advised"), [(1.5e11, False), (1.05e11, False), (5e10, True)])
def test_fewer_threads_are_advised_where_they_are_faster(monkeypatch, two, advised):
    monkeypatch.setattr("sparsemix.doctor.thread_rates", lambda: {1: 1e11, 2: two})
    monkeypatch.setattr("sparsemix.doctor.torch.get_num_threads", lambda: 2)
    assert found("threads").found.startswith("2 (100 GFLOP/s with 1")
    assert bool(found("threads").advice) == advised


def test_a_missing_compiler_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setenv("SPARSEMIX_CC", "none")
    finding = found("C compiler")
    assert finding.found == "none"
    assert "install gcc" in finding.advice


def test_a_compiler_that_cannot_build_is_said_at_the_op(monkeypatch):
    monkeypatch.setattr("sparsemix.doctor.build.unusable", lambda source: "cc cannot build an_op: broken")
    (kernels, *_) = all_kernels()
    mine = Kernels(kernels.op, source=Path(__file__))
    monkeypatch.setattr("sparsemix.doctor.all_kernels", lambda: [mine])
    assert found(kernels.op) == (kernels.op, "torch", "cc cannot build an_op: broken")


def test_a_wrong_wish_is_advice_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEMIX_ISA", "avx1024")
    assert "SPARSEMIX_ISA=avx1024" in found("instruction set").advice


def test_a_cache_that_others_may_write_is_said_once(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SPARSEMIX_CACHE", str(tmp_path / "cache"))
    assert _cache() == ("compiled kernels", f"{tmp_path}/cache (0 libraries)", "")
    (tmp_path / "cache").chmod(0o777)
    why = f"kernels in {tmp_path}/cache are not run: {tmp_path}/cache can be written by others (mode 0777)"
    (mine,) = [kernels for kernels in all_kernels() if kernels.op == "row_dot"]
    monkeypatch.setattr("sparsemix.doctor.all_kernels", lambda: [mine])
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        findings = {finding.what: finding for finding in examine()}
    assert findings["compiled kernels"].advice == f"{why}; SPARSEMIX_CACHE names another folder"
    assert findings["row_dot"] == ("row_dot", "torch", "")


def test_the_command_prints_a_table(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "doctor")
    assert code == 0
    assert err == ""
    assert "C compiler" in out
    assert "row_dot" in out


@pytest.mark.parametrize("chosen", ["always", "madvise", "never"])
def test_huge_pages_are_advised_only_where_they_are_off(monkeypatch, tmp_path, chosen):
    state = tmp_path / "enabled"
    state.write_text(" ".join(f"[{word}]" if word == chosen else word for word in ("always", "madvise", "never")))
    monkeypatch.setattr("sparsemix.doctor.HUGE_PAGES", state)
    finding = found("huge pages")
    assert finding.found == chosen
    assert bool(finding.advice) == (chosen == "never")
