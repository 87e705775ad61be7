import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import assert_errs_at_most_twice, assert_fp32_is, assert_same, randn
from torch.library import opcheck

from lookups import take_rows
from sparsemix.errors import ConfigError
from sparsemix.ops import build
from sparsemix.ops.row_dot import row_dot
from sparsemix.ops.row_dot.reference import row_dot as dot_reference
from sparsemix.ops.row_grad import table_grad
from sparsemix.ops.row_grad.factored import lend
from sparsemix.ops.row_mix import row_mix
from sparsemix.ops.row_mix.reference import row_mix as mix_reference

KERNELS = ["native", "triton"]
OPS = {"row_dot": (row_dot, dot_reference), "row_mix": (row_mix, mix_reference)}


def per_token(name, N, R, D):
    return randn(N, D if name == "row_dot" else R)


def zipf(N, R, M):
    """Row m is picked in proportion to 1 / (m + 1)."""
    return torch.multinomial(1 / torch.arange(1.0, M + 1), N * R + 1, replacement=True)[1:].view(N, R)


def ids_of(case, N, R, M):
    return {
        "random": torch.randint(M, (N, R)),
        "zipf": zipf(N, R, M),
        "one_row_for_all": torch.full((N, R), M - 1),
        "twice_in_a_token": torch.randint(M, (N, 1)).expand(N, R),
        "strided": torch.randint(M, (R, N)).T,
    }[case]


@pytest.mark.parametrize("expanded", [False, True], ids=["gradient", "stride_0_gradient"])
@pytest.mark.parametrize(("N", "R", "M", "D"), [(63, 5, 16, 10), (7, 3, 4, 640), (1, 1, 1, 1), (0, 3, 4, 2)])
@pytest.mark.parametrize("case", ["random", "one_row_for_all", "twice_in_a_token", "strided"])
@pytest.mark.parametrize("name", OPS)
def test_row_op_is_its_reference_with_all_gradients(name, case, N, R, M, D, expanded):
    op, reference = OPS[name]
    assert_same(op, reference, per_token(name, N, R, D), ids_of(case, N, R, M), randn(M, D), expanded=expanded)


# Odd sizes, groups of eight picks and what is left of them, and rows longer than a kernel sums at a time.
SIZES = [(1, 1, 1, 1), (0, 3, 4, 2), (13, 5, 16, 10), (3, 21, 40, 63), (5, 12, 9, 640), (2, 9, 7, 1090)]


def kernel_inputs(name, case, N, R, M, D, dtype):
    """A strided operand, ids and a table; and a gradient, of stride 0 where the ids are strided."""
    operand = per_token(name, N, 2 * R, 2 * D)[:, ::2].to(dtype)
    direction = randn(()) if case == "strided" else randn(N, R if name == "row_dot" else D)
    return (operand, ids_of(case, N, R, M), (randn(M, D) * D**-0.5).to(dtype)), direction


@pytest.mark.parametrize(("N", "R", "M", "D"), SIZES)
@pytest.mark.parametrize("case", ["zipf", "one_row_for_all", "strided"])
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("name", OPS)
def test_kernel_is_the_reference_with_all_gradients(name, impl, case, N, R, M, D):
    op, reference = OPS[name]
    inputs, direction = kernel_inputs(name, case, N, R, M, D, torch.float32)
    assert_fp32_is(partial(op, impl=impl), reference, *inputs, direction=direction)


# Not the smallest: one number's rounding is luck.
@pytest.mark.parametrize(("N", "R", "M", "D"), SIZES[2:])
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("name", OPS)
def test_kernel_errs_at_most_twice_as_much_as_pytorch_in_bf16(name, impl, N, R, M, D):
    op, reference = OPS[name]
    inputs, direction = kernel_inputs(name, "zipf", N, R, M, D, torch.bfloat16)
    assert_errs_at_most_twice(
        partial(op, impl=impl), partial(op, impl="torch"), reference, *inputs, direction=direction
    )


@pytest.mark.parametrize("N", [1, 3, 70])
@pytest.mark.parametrize("name", OPS)
def test_threads_change_no_bit(name, N):
    inputs = per_token(name, N, 27, 130).float(), torch.randint(50, (N, 27)), randn(50, 130).float()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(OPS[name][0](*inputs, impl="native"))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", OPS)
def test_the_portable_build_is_the_reference(name, monkeypatch):
    monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    op, reference = OPS[name]
    kernel, theirs = partial(op, impl="native"), partial(op, impl="torch")
    inputs, direction = kernel_inputs(name, "zipf", 9, 13, 8, 39, torch.float32)
    assert_fp32_is(kernel, reference, *inputs, direction=direction)
    inputs, direction = kernel_inputs(name, "zipf", 9, 13, 8, 39, torch.bfloat16)
    assert_errs_at_most_twice(kernel, theirs, reference, *inputs, direction=direction)


@pytest.mark.parametrize("name", OPS)
def test_a_table_with_strides_is_left_to_torch(name):
    op, reference = OPS[name]
    inputs = per_token(name, 4, 3, 5).float(), torch.randint(9, (4, 3)), randn(5, 9).float().T
    with pytest.raises(ConfigError, match=f"{name}: impl=native cannot run here: the table is not contiguous"):
        op(*inputs, impl="native")
    torch.testing.assert_close(op(*inputs), reference(*inputs))


@pytest.mark.parametrize("name", OPS)
def test_row_op_takes_strided_inputs(name):
    op, reference = OPS[name]
    strided = per_token(name, 22, 6, 18)[::2, ::2]
    table = randn(9, 5).T
    assert not table.is_contiguous()
    assert_same(op, reference, strided, torch.randint(5, (11, strided.shape[1] if name == "row_mix" else 3)), table)


def test_row_ops_are_their_sums_over_looked_up_rows():
    x, ids, table, coef = randn(3, 4), torch.tensor([[0, 2], [1, 1], [2, 0]]), randn(3, 4), randn(3, 2)
    for n in range(3):
        for r in range(2):
            dot = sum(float(x[n, c] * table[ids[n, r], c]) for c in range(4))
            assert float(row_dot(x, ids, table)[n, r]) == pytest.approx(dot, abs=1e-12)
        mix = sum(coef[n, r] * table[ids[n, r]] for r in range(2))
        torch.testing.assert_close(row_mix(coef, ids, table)[n], mix, rtol=0, atol=1e-12)


def test_a_row_nobody_asked_for_gets_a_zero_gradient():
    table = randn(5, 3).requires_grad_()
    row_dot(randn(4, 3), torch.tensor([[0, 3]] * 4), table).square().sum().backward()
    assert table.grad is not None
    assert table.grad[[1, 2, 4]].abs().max() == 0
    assert table.grad[[0, 3]].abs().min() > 0


@pytest.mark.parametrize("name", OPS)
def test_row_op_computes_in_the_dtype_of_the_table_whatever_autocast_says(name):
    op, reference = OPS[name]
    low = per_token(name, 9, 3, 16).bfloat16()
    ids, table = torch.randint(8, (9, 3)), randn(8, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(low, ids, table)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference(low.float(), ids, table))


def test_torch_accepts_the_row_ops():
    x, ids, table = randn(4, 3).requires_grad_(), torch.tensor([[0, 3]] * 4), randn(5, 3).requires_grad_()
    coef = randn(4, 2).requires_grad_()
    low = [x.detach().float().requires_grad_() for x in (x, table, coef)]
    # Without symbolic sizes: num_rows would be one, and the tests' type checks want an int.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    opcheck(torch.ops.sparsemix.row_dot.default, (x, ids, table, False, "auto"), test_utils=tests)
    opcheck(torch.ops.sparsemix.row_mix.default, (coef, ids, table, False, "auto"), test_utils=tests)
    opcheck(torch.ops.sparsemix.row_dot.default, (low[0], ids, low[1], False, "native"), test_utils=tests)
    opcheck(torch.ops.sparsemix.row_mix.default, (low[2], ids, low[1], False, "native"), test_utils=tests)
    opcheck(torch.ops.sparsemix.row_table_grad.default, (randn(4, 2), ids, randn(4, 3), 5), test_utils=tests)


def test_table_gradient_adds_up_picks_of_the_same_row():
    coef, ids, vec = randn(3, 2), torch.tensor([[1, 1], [0, 1], [0, 0]]), randn(3, 4)
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    for n in range(3):
        for r in range(2):
            wanted[ids[n, r]] += coef[n, r] * vec[n]
    torch.testing.assert_close(table_grad(coef, ids, vec, 3), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_two_to_the_31_elements_are_found(dtype, impl):
    D, M = 1024, 2**21 + 3
    # The pages of a row that nobody touches are never mapped.
    table = torch.empty(M, D, dtype=dtype)
    assert (M - 3) * D == 2**31
    ids = torch.tensor([[0, M - 1], [M - 3, 1], [M - 2, M - 2]])
    rows = ids.unique()
    table[rows] = torch.randn(len(rows), D).to(dtype)
    small, where = table[rows], torch.searchsorted(rows, ids)
    x, coef = torch.randn(3, D).to(dtype), torch.randn(3, 2).to(dtype)
    assert torch.equal(row_dot(x, ids, table, impl=impl), row_dot(x, where, small, impl=impl))
    assert torch.equal(row_mix(coef, ids, table, impl=impl), row_mix(coef, where, small, impl=impl))
    # Addresses that lost their upper bits would read row 0 instead of row M - 3.
    assert not torch.equal(row_dot(x, where, small)[1, 0], row_dot(x, torch.zeros_like(where), small)[1, 0])


def available_gb():
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if sys.platform == "linux" else []
    return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("MemAvailable")), 0.0)


@pytest.mark.skipif(available_gb() < 8, reason="its gradient fills 4.3 GB of memory")
def test_gradients_of_rows_beyond_two_to_the_31_elements_reach_them():
    D, M = 1024, 2**21 + 3
    ids = torch.tensor([[0, M - 1], [M - 3, M - 1]])
    coef, vec = torch.randn(2, 2).bfloat16(), torch.randn(2, D).bfloat16()
    rows = ids.unique()
    grad = table_grad(coef, ids, vec, M)
    assert torch.equal(grad[rows], table_grad(coef, torch.searchsorted(rows, ids), vec, len(rows)))
    assert not grad[1:-3:1009].any()


def test_recorded_factors_are_the_dense_gradient():
    ids, x, table = torch.randint(9, (7, 3)), randn(7, 4), randn(9, 4).requires_grad_()
    direction = randn(7, 3)
    (wanted,) = torch.autograd.grad(row_dot(x, ids, table), table, direction)
    lend(table, table)
    row_dot(x, ids, table, record=True).backward(direction)
    (left,) = take_rows(table)
    torch.testing.assert_close(table_grad(left.coef, left.ids, left.vec, 9), wanted, rtol=0, atol=1e-12)
    assert take_rows(table) == []


def test_nothing_is_recorded_for_a_table_that_needs_no_gradient():
    x, table = randn(7, 4).requires_grad_(), randn(9, 4)
    lend(table, table)
    row_dot(x, torch.randint(9, (7, 3)), table, record=True).sum().backward()
    assert take_rows(table) == []


@pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("wrong", [-1, 9])
@pytest.mark.parametrize("name", OPS)
def test_an_id_of_no_row_is_an_error_not_a_read_past_the_table(name, wrong):
    x = torch.randn(2, 4 if name == "row_dot" else 3)
    ids = torch.tensor([[0, 1, 2], [3, wrong, 4]])
    with pytest.raises(IndexError, match="out of a table of 9 rows"):
        OPS[name][0](x, ids, torch.randn(9, 4), impl="native")
