"""Compiling, caching and calling C kernels."""

from pathlib import Path

import pytest
import torch

from sparsemix.errors import ConfigError
from sparsemix.ops import build, native
from sparsemix.ops.statements import KERNELS

TWICE = """#include "native.h"
void twice(const float *x, float *y, int64_t n, double by, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * (float)by;
}
void rounded(const float *x, bf16 *y, int64_t n, int64_t threads) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store_bf16(y + i, load_f32(x + i));
    for (; i < n; i++) put_bf16(y + i, one_f32(x + i));
}
void widened(const bf16 *x, float *y, int64_t n, int64_t threads) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store_f32(y + i, load_bf16(x + i));
    for (; i < n; i++) put_f32(y + i, one_bf16(x + i));
}
void summed(const float *x, float *y, int64_t threads) { *y = lane_sum(load_f32(x)) + (W < 16 ? x[W] : 0); }
"""
STATEMENTS = {"twice": "x:f32[n] y:f32[n] n by", "rounded": "x:f32[n] y:bf16[n] n", "widened": "x:bf16[n] y:f32[n] n"}
STATEMENTS |= {"summed": "x:f32[*] y:f32[1]"}
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPARSEMIX_CACHE", str(tmp_path / "cache"))
    for name, statement in STATEMENTS.items():
        monkeypatch.setitem(KERNELS, f"twice.{name}", statement)
    path = tmp_path / "twice" / "native.c"
    path.parent.mkdir()
    path.write_text(TWICE)
    return path


def libraries(source: Path) -> list[str]:
    return sorted(path.name for path in (source.parent.parent / "cache").iterdir())


@needs_compiler
def test_a_kernel_is_compiled_once_and_called(source):
    assert build.unusable(source) is None
    x, y = torch.randn(17), torch.empty(17)
    native.call(source, "twice", x, y, 17, 2.0)
    assert torch.equal(y, 2 * x)
    assert build.unusable(source) is None
    assert len(libraries(source)) == 1


@needs_compiler
def test_another_content_is_another_library(source):
    assert build.unusable(source) is None
    first = libraries(source)
    changed = source.parent / "changed.c"
    changed.write_text(TWICE.replace("* (float)by", "* (float)by + 1"))
    assert build.unusable(changed) is None
    assert set(first) < set(libraries(source))
    y = torch.empty(3)
    native.call(changed, "twice", torch.ones(3), y, 3, 2.0)
    assert torch.equal(y, torch.full((3,), 3.0))


@needs_compiler
def test_another_header_beside_the_source_is_another_library(source):
    assert build.unusable(source) is None
    first = libraries(source)
    (source.parent / "more.h").write_text("int more;")
    again = source.parent / "again.c"
    again.write_text(TWICE)
    assert build.unusable(again) is None
    assert set(first) < set(libraries(source))


@needs_compiler
def test_every_instruction_set_of_this_machine_gives_the_same(source, monkeypatch):
    x = torch.cat([torch.randn(60), torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-40])])
    usable = list(build.ISAS)[: list(build.ISAS).index(build.machine_isa()) + 1]
    for isa in usable:
        monkeypatch.setenv("SPARSEMIX_ISA", isa)
        assert build.unusable(source) is None
        half, back = torch.empty(65, dtype=torch.bfloat16), torch.empty(65)
        native.call(source, "rounded", x, half, 65)
        native.call(source, "widened", half, back, 65)
        torch.testing.assert_close(half, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back, half.float(), rtol=0, atol=0, equal_nan=True)
    assert len(libraries(source)) == len(usable)


@needs_compiler
def test_lanes_are_summed(source):
    total = torch.empty(1)
    monotone = torch.arange(32.0)
    assert build.unusable(source) is None
    native.call(source, "summed", monotone, total)
    assert float(total) in (sum(range(4)) + 4, sum(range(8)) + 8, sum(range(16)))


def test_an_instruction_set_that_the_machine_has_not_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSEMIX_ISA", "avx1024")
    with pytest.raises(ConfigError, match="SPARSEMIX_ISA=avx1024 is none of portable"):
        build.isa()


def test_without_a_compiler_the_reason_is_said(source, monkeypatch):
    monkeypatch.setenv("SPARSEMIX_CC", "none")
    assert "no C compiler" in str(build.unusable(source))


@needs_compiler
def test_a_source_that_does_not_compile_says_the_first_error(source):
    source.write_text("int broken( {")
    with pytest.warns(RuntimeWarning, match="PyTorch's slower kernels run instead"):
        assert "cannot build twice" in str(build.unusable(source))
    assert libraries(source) == []


@needs_compiler
def test_a_folder_that_cannot_be_written_is_a_reason(source, monkeypatch):
    (source.parent / "file").write_text("")
    monkeypatch.setenv("SPARSEMIX_CACHE", str(source.parent / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="slower kernels"):
        assert build.unusable(source)


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_kernels_share_the_thread_pool_of_torch(source):
    assert build.unusable(source) is None
    native.call(source, "twice", torch.ones(3), torch.empty(3), 3, 1.0)
    pools = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(pools) == 1
