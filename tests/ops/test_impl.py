"""Who runs an op: by device and dtype, or as asked for."""

from pathlib import Path

import pytest
import torch

from sparsemix.errors import ConfigError
from sparsemix.ops import build, impl, operands
from sparsemix.ops.impl import Kernels

SOURCE = Path(impl.__file__).parent / "row_dot" / "native.c"
X = torch.ones(2)


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(build, "unusable", lambda source: None)
    monkeypatch.delenv("SPARSEMIX_IMPL", raising=False)
    return Kernels("an_op", source=SOURCE, triton=True)


def test_auto_is_the_c_kernel_on_a_processor(compiled):
    assert compiled.pick("auto", X) == "native"
    assert impl.picked()["an_op"] == "native"


def test_auto_falls_back_where_dtype_or_operands_do_not_fit(compiled):
    assert compiled.pick("auto", X.double()) == "torch"
    assert compiled.pick("auto", X, refused="too many rows") == "torch"
    assert Kernels("an_op").pick("auto", X) == "torch"


def test_an_explicit_wish_never_falls_back(compiled, monkeypatch):
    assert compiled.pick("reference", X.double()) == "reference"
    with pytest.raises(ConfigError, match="an_op: impl=native cannot run here: too many rows; use impl=auto"):
        compiled.pick("native", X, refused="too many rows")
    with pytest.raises(ConfigError, match="takes float32, bfloat16, not"):
        compiled.pick("native", X.double())
    with pytest.raises(ConfigError, match="no such kernel"):
        Kernels("an_op").pick("triton", X)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="run on a GPU"):
        compiled.pick("triton", X)
    with pytest.raises(ConfigError, match="impl=fastest is none of auto"):
        compiled.pick("fastest", X)


def test_the_environment_stands_in_for_auto_only(compiled, monkeypatch):
    monkeypatch.setenv("SPARSEMIX_IMPL", "reference")
    assert compiled.pick("auto", X) == "reference"
    assert compiled.pick("torch", X) == "torch"
    monkeypatch.setenv("SPARSEMIX_IMPL", "quick")
    with pytest.raises(ConfigError, match="impl=quick"):
        compiled.pick("auto", X)


def test_without_a_compiler_auto_is_torch_and_native_an_error(compiled, monkeypatch):
    monkeypatch.setattr(build, "unusable", lambda source: "no C compiler was found")
    assert compiled.pick("auto", X) == "torch"
    with pytest.raises(ConfigError, match="no C compiler"):
        compiled.pick("native", X)


def test_all_operands_choose_not_the_first(compiled):
    assert compiled.pick("auto", X, X.double()) == "torch"
    with pytest.raises(ConfigError, match="takes float32, bfloat16, not"):
        compiled.pick("native", X, X.half())


def test_what_a_statement_works_out_of_its_sizes_is_compiled_once():
    N, R, M, D = 3, 2, 5, 4
    operands_of_op = torch.ones(N, D), torch.zeros(N, R, dtype=torch.long), torch.ones(M, D)
    operands.check_op("row_dot", *operands_of_op)
    before = operands._compiled.cache_info()
    for _ in range(3):
        operands.check_op("row_dot", *operands_of_op)
    after = operands._compiled.cache_info()
    assert after.misses == before.misses and after.hits > before.hits
