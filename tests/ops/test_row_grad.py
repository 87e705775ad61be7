"""A table's gradient from the factors of its look-ups: ordered, dense, its norm, and several as one."""

import pytest
import torch
from compare import assert_rounded
from row_cases import CASES, IMPLS, lookup
from torch.library import opcheck

from lookups import take_rows
from sparsemix.errors import ConfigError
from sparsemix.ops import build
from sparsemix.ops.flop_counter import count_flops
from sparsemix.ops.row_grad import KERNELS, RowGrad, joined, record_rows, row_norm, sort_rows, table_grad
from sparsemix.ops.row_grad.factored import lend
from sparsemix.ops.row_grad.reference import table_grad as reference

each_impl = pytest.mark.parametrize("impl", IMPLS)
each_case = pytest.mark.parametrize("case", CASES)
needs_compiler = pytest.mark.skipif(build.unusable(KERNELS.source) is not None, reason="no C compiler")


def exact(grad, M):
    return reference(grad.coef.double(), grad.ids, grad.vec.double(), M)


def error(got, wanted):
    return float((got.double() - wanted).norm())


def test_the_gradient_is_the_sum_of_all_picks():
    coef, ids, vec = torch.randn(3, 2).double(), torch.tensor([[1, 1], [0, 1], [0, 0]]), torch.randn(3, 4).double()
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    for n in range(3):
        for r in range(2):
            wanted[ids[n, r]] += coef[n, r] * vec[n]
    torch.testing.assert_close(reference(coef, ids, vec, 3), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(table_grad(coef, ids, vec, 3), wanted, rtol=0, atol=1e-12)


@each_case
@each_impl
def test_picks_are_ordered_by_row_and_by_place_within_a_row(impl, case):
    grad, (M, _) = lookup(case)
    order, flat = sort_rows(grad.ids, M, impl), grad.ids.flatten()
    assert order.picks.tolist() == sorted(range(flat.numel()), key=lambda p: (int(flat[p]), p))
    assert order.rows.tolist() == sorted(set(flat.tolist()))
    assert order.starts.diff().tolist() == [int((flat == row).sum()) for row in order.rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
@each_impl
def test_the_dense_gradient_errs_no_more_than_twice_torch(impl, case, dtype):
    grad, (M, D) = lookup(case, dtype)
    got = table_grad(grad.coef, grad.ids, grad.vec, M, impl)
    assert got.dtype == dtype and got.shape == (M, D)
    torchs = table_grad(grad.coef, grad.ids, grad.vec, M, "torch")
    wanted = exact(grad, M)
    size = reference(grad.coef.double().square(), grad.ids, grad.vec.double().square(), M).sqrt()
    assert_rounded(got, wanted, size, dtype, grad.ids.numel(), torchs)


@each_case
@each_impl
def test_the_norm_is_that_of_the_dense_gradient(impl, case):
    grad, (M, _) = lookup(case)
    got = row_norm(sort_rows(grad.ids, M, impl), grad.coef, grad.vec, impl)
    torch.testing.assert_close(got.double(), exact(grad, M).norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [-1, 4])
@each_impl
def test_an_id_of_no_row_is_an_error(impl, bad):
    with pytest.raises(IndexError, match="out of a table of 4 rows"):
        sort_rows(torch.tensor([[0, 3], [bad, 1]]), 4, impl)


@each_impl
def test_strided_operands_are_read_as_they_are(impl):
    ids = torch.randint(9, (4, 11)).T
    coef, vec = torch.randn(22, 8)[::2, ::2], torch.randn(1, 6).expand(11, 6)
    got = table_grad(coef, ids, vec, 9, impl)
    torch.testing.assert_close(got, reference(coef, ids, vec, 9))


@needs_compiler
@pytest.mark.parametrize("case", ["one_row_for_all", "zipf", "wide"])
def test_more_threads_give_the_same_bits(case):
    grad, (M, _) = lookup(case)
    big = RowGrad(grad.ids.repeat(60, 1), grad.coef.repeat(60, 1), torch.randn(60 * len(grad.ids), grad.vec.shape[1]))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        order = sort_rows(big.ids, M, "native")
        norm = row_norm(order, big.coef, big.vec, "native")
        found.append((*order, norm, table_grad(big.coef, big.ids, big.vec, M, "native")))
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


@needs_compiler
def test_the_portable_build_agrees(monkeypatch):
    grad, (M, _) = lookup("zipf")
    wide = table_grad(grad.coef, grad.ids, grad.vec, M, "native")
    monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    torch.testing.assert_close(table_grad(grad.coef, grad.ids, grad.vec, M, "native"), wide)
    order = sort_rows(grad.ids, M, "native")
    torch.testing.assert_close(row_norm(order, grad.coef, grad.vec, "native"), wide.norm())


@needs_compiler
def test_a_hot_row_is_summed_in_pieces_and_its_neighbours_in_one():
    """Rows of 1, 256, 257, 513 and 4 picks: those beyond a piece of 256 are cut, and pieces must not overlap."""
    counts = [1, 256, 257, 513, 4]
    ids = torch.arange(5).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))][:, None]
    grad = RowGrad(ids, torch.randn(len(ids), 1), torch.randn(len(ids), 19))
    got = table_grad(grad.coef, ids, grad.vec, 5, "native")
    torch.testing.assert_close(got.double(), exact(grad, 5), rtol=1e-5, atol=1e-4)


def test_several_look_ups_of_any_width_are_one_gradient():
    parts = [RowGrad(torch.randint(9, (n, r)), torch.randn(n, r), torch.randn(n, 5)) for n, r in [(7, 4), (3, 6)]]
    whole = joined(parts)
    torch.testing.assert_close(exact(whole, 9), exact(parts[0], 9) + exact(parts[1], 9))
    assert joined(parts[:1]) is parts[0]


def test_what_was_recorded_survives_its_inputs_and_is_taken_once():
    table, (grad, _) = torch.zeros(40, 10), lookup("odd")
    inputs = [part.clone() for part in grad]
    lend(table, table)
    record_rows(table, *inputs)
    for part in inputs:
        part.zero_()
    (left,) = take_rows(table)
    assert all(torch.equal(a, b) for a, b in zip(left, grad, strict=True))
    assert take_rows(table) == []


def test_an_explicit_kernel_refuses_fp64():
    grad, (M, _) = lookup("odd", torch.float64)
    with pytest.raises(ConfigError, match="row_grad: impl=native cannot run here: the kernel takes float32, bfloat16"):
        table_grad(grad.coef, grad.ids, grad.vec, M, "native")


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_torch_accepts_the_ops(impl):
    grad, (M, _) = lookup("odd")
    opcheck(torch.ops.sparsemix.row_table_grad.default, (grad.coef, grad.ids, grad.vec, M, impl))
    opcheck(torch.ops.sparsemix.sort_rows.default, (grad.ids, M, impl))
    opcheck(torch.ops.sparsemix.row_norm.default, (*sort_rows(grad.ids, M), grad.coef, grad.vec, impl))


def test_a_norm_counts_what_the_gradient_costs_and_an_order_nothing():
    grad, (M, D) = lookup("odd")
    assert count_flops(lambda: sort_rows(grad.ids, M)) == 0
    order = sort_rows(grad.ids, M)
    assert count_flops(lambda: row_norm(order, grad.coef, grad.vec)) == 2 * grad.ids.numel() * D


def test_a_norm_has_no_gradient():
    grad, (M, _) = lookup("odd")
    norm = row_norm(sort_rows(grad.ids, M), grad.coef.requires_grad_(), grad.vec)
    with pytest.raises(RuntimeError, match="row_norm"):
        norm.backward()


@pytest.mark.parametrize("part", ["rows", "starts", "picks"])
def test_an_order_is_looked_through_again_once_it_was_written_to(part):
    ids, coef, vec = torch.randint(9, (5, 3)), torch.randn(5, 3), torch.randn(5, 4)
    order = sort_rows(ids, 9)
    row_norm(order, coef, vec)
    getattr(order, part)[-1] = -1
    with pytest.raises((IndexError, ValueError), match=f"row_norm: {part}"):
        row_norm(order, coef, vec)
    # Nor is it taken for a smaller gradient's.
    with pytest.raises(IndexError, match="row_norm: picks"):
        row_norm(sort_rows(ids, 9), coef[:2], vec[:2])
