"""AdamW on a table's rows from the factors of its gradient."""

import pytest
import torch
from memory import allocated
from row_cases import CASES, IMPLS, lookup
from torch.library import opcheck

from sparsemix.ops import build
from sparsemix.ops.flop_counter import count_flops
from sparsemix.ops.row_adam import KERNELS, Moments, Rates, all_rows_, some_rows_
from sparsemix.ops.row_adam.reference import adamw
from sparsemix.ops.row_grad import RowGrad, sort_rows
from sparsemix.ops.row_grad.reference import table_grad

each_impl = pytest.mark.parametrize("impl", IMPLS)
each_case = pytest.mark.parametrize("case", CASES)
each_moment = pytest.mark.parametrize("by_row", [False, True], ids=["full", "row"])
needs_compiler = pytest.mark.skipif(build.unusable(KERNELS.source) is not None, reason="no C compiler")
RATES = Rates(0.1, (0.9, 0.95), 1e-8, 3)


def state(M, D, by_row, dtype=torch.float32):
    """A table in the middle of a run."""
    return torch.randn(M, D).to(dtype), Moments(torch.randn(M, D), torch.rand(M) if by_row else torch.rand(M, D))


def copied(table, moments):
    return table.clone(), Moments(*(x.clone() for x in moments))


def wanted(table, moments, grad, keep):
    """The equation in fp64 on every row."""
    dense = table_grad(grad.coef.double(), grad.ids, grad.vec.double(), len(table))
    return adamw(table.double(), *(x.double() for x in moments), dense, RATES, keep)


def assert_near(got, exact, **tolerance):
    for name, a, b in zip(("w", "m", "v"), got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_the_equation_is_torchs_adamw():
    w, moments = state(5, 4, by_row=False)
    g, parameter = torch.randn(5, 4), torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    slots = {"step": torch.tensor(2.0), "exp_avg": moments.first.clone(), "exp_avg_sq": moments.second.clone()}
    optimizer.state[parameter] = slots
    parameter.grad = g
    optimizer.step()
    got = adamw(w, *moments, g, RATES, 1 - 0.1 * 0.2)
    for mine, theirs in zip(got, (parameter.detach(), slots["exp_avg"], slots["exp_avg_sq"]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_row_moment_is_the_mean_of_the_rows_squares():
    w, moments = state(2, 3, by_row=True)
    g = torch.randn(2, 3)
    _, _, v = adamw(w, *moments, g, RATES, 1.0)
    for row in range(2):
        mean = sum(float(g[row, d]) ** 2 for d in range(3)) / 3
        assert float(v[row]) == pytest.approx(0.95 * float(moments.second[row]) + 0.05 * mean)


@each_moment
@each_case
@each_impl
def test_rows_with_a_gradient_take_the_dense_step_and_others_stay(impl, case, by_row):
    grad, (M, D) = lookup(case)
    table, moments = state(M, D, by_row)
    w, new = copied(table, moments)
    order = sort_rows(grad.ids, M, impl)
    some_rows_(w, new, grad, order, RATES, impl=impl)
    exact, rows = wanted(table, moments, grad, 1.0), order.rows
    assert_near([x[rows] for x in (w, *new)], [x[rows] for x in exact], rtol=1e-5, atol=1e-4)
    rest = torch.ones(M, dtype=torch.bool).index_fill_(0, rows, False)
    for got, before in zip((w, *new), (table, *moments), strict=True):
        assert torch.equal(got[rest], before[rest])


@each_moment
@each_case
@each_impl
def test_every_row_takes_the_dense_step_when_all_are_wished(impl, case, by_row):
    grad, (M, D) = lookup(case)
    table, moments = state(M, D, by_row)
    w, new = copied(table, moments)
    all_rows_(w, new, grad, sort_rows(grad.ids, M, impl), RATES, keep=0.9, impl=impl)
    assert_near((w, *new), wanted(table, moments, grad, 0.9), rtol=1e-5, atol=1e-4)


@each_impl
def test_rows_that_never_had_a_gradient_may_be_passed_over_without_decay(impl):
    grad, (M, D) = lookup("zipf")
    table, order = torch.randn(M, D), sort_rows(grad.ids, M, impl)
    seen = torch.zeros(M, dtype=torch.uint8).index_fill_(0, order.rows, 1)
    seen[-9:] = 1  # rows of earlier steps
    moments = Moments(*(torch.rand(M, D) * seen[:, None] for _ in range(2)))
    w, new = copied(table, moments)
    all_rows_(w, new, grad, order, RATES, seen=seen, impl=impl)
    assert_near((w, *new), wanted(table, moments, grad, 1.0), rtol=1e-5, atol=1e-4)
    assert torch.equal(w[seen == 0], table[seen == 0]) and (w[-9:] != table[-9:]).any(dim=1).all()


@each_impl
def test_a_row_makes_up_for_the_decay_that_it_missed(impl):
    grad, (M, D) = lookup("zipf")
    table, moments = state(M, D, by_row=False)
    decayed = -torch.rand(M, dtype=torch.float64)
    w, new, had = *copied(table, moments), decayed.clone()
    order = sort_rows(grad.ids, M, impl)
    some_rows_(w, new, grad, order, RATES, had, -1.5, impl=impl)
    keep, rows = (-1.5 - decayed).exp()[:, None], order.rows
    exact = wanted(table, moments, grad, keep)
    assert_near([x[rows] for x in (w, *new)], [x[rows] for x in exact], rtol=1e-5, atol=1e-4)
    assert (had[rows] == -1.5).all()
    assert len(rows) < M and set(had.tolist()) - {-1.5} <= set(decayed.tolist())


@each_moment
@each_impl
def test_a_bf16_table_is_rounded_once(impl, by_row):
    grad, (M, D) = lookup("odd", torch.bfloat16)
    table, moments = state(M, D, by_row, torch.bfloat16)
    w, new = copied(table, moments)
    all_rows_(w, new, grad, sort_rows(grad.ids, M, impl), RATES, impl=impl)
    exact = wanted(table, moments, grad, 1.0)
    assert w.dtype == torch.bfloat16
    for got, other in zip(new, exact[1:], strict=True):
        torch.testing.assert_close(got.double(), other, rtol=1e-5, atol=1e-4)
    # Half a unit in the last of 8 bits (a whole one where Triton's interpreter cuts off the rest), and fp32's error.
    share = 2**-7 if impl == "triton" else 2**-8
    assert ((w.double() - exact[0]).abs() <= share * exact[0].abs() + 1e-4).all()


@needs_compiler
@each_moment
@pytest.mark.parametrize("case", ["one_row_for_all", "zipf", "wide"])
def test_more_threads_give_the_same_bits(case, by_row):
    grad, (M, D) = lookup(case)
    table, moments = state(M, D, by_row)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        w, new = copied(table, moments)
        order = sort_rows(grad.ids, M)
        some_rows_(w, new, grad, order, RATES, impl="native")
        all_rows_(w, new, grad, order, RATES, impl="native")
        found.append((w, *new))
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


@needs_compiler
@each_moment
def test_the_portable_build_agrees(monkeypatch, by_row):
    grad, (M, D) = lookup("wide")
    table, moments = state(M, D, by_row)
    w, new = copied(table, moments)
    monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    some_rows_(w, new, grad, sort_rows(grad.ids, M), RATES, impl="native")
    exact, rows = wanted(table, moments, grad, 1.0), grad.ids.unique()
    assert_near([x[rows] for x in (w, *new)], [x[rows] for x in exact], rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("step", [some_rows_, all_rows_])
def test_no_gradient_is_ever_formed(step):
    N, R, M, D = 256, 16, 4096, 64
    grad = RowGrad(torch.randint(M, (N, R)), torch.randn(N, R), torch.randn(N, D))
    table, moments = state(M, D, by_row=False)
    order = sort_rows(grad.ids, M)
    step(table, moments, grad, order, RATES)
    seen = allocated(lambda: step(table, moments, grad, sort_rows(grad.ids, M), RATES))
    # An order is 3 numbers of 8 bytes a pick; the rows' gradients, (U, D), would be 16 times as large.
    assert seen.peak <= 4 * 8 * (N * R + 1) < 4 * D * len(order.rows)


@needs_compiler
def test_rows_beyond_two_to_the_31_elements_are_found():
    D, M = 1024, 2**21 + 3
    # The pages of a row that nobody touches are never mapped.
    table, moments = torch.empty(M, D, dtype=torch.bfloat16), Moments(torch.empty(M, D), torch.empty(M))
    rows = torch.tensor([0, 1, M - 3, M - 2, M - 1])
    for x in (table, *moments):
        x[rows] = 1
    grad = RowGrad(torch.tensor([[0, M - 1], [M - 3, M - 1]]), torch.randn(2, 2), torch.randn(2, D))
    small = (torch.ones(5, D, dtype=torch.bfloat16), Moments(torch.ones(5, D), torch.ones(5)))
    few = grad._replace(ids=torch.searchsorted(rows, grad.ids))
    some_rows_(table, moments, grad, sort_rows(grad.ids, M), RATES)
    some_rows_(*small, few, sort_rows(few.ids, 5), RATES)
    for big, other in zip((table, *moments), (small[0], *small[1]), strict=True):
        assert torch.equal(big[rows], other)


@pytest.mark.parametrize("op", [torch.ops.sparsemix.row_adam_some, torch.ops.sparsemix.row_adam_all])
@pytest.mark.parametrize("impl", IMPLS[:2])
def test_torch_accepts_the_ops_and_what_they_say_they_change(impl, op):
    grad, (M, D) = lookup("odd")
    table, moments = state(M, D, by_row=False)
    last = torch.zeros(M, dtype=torch.float64) if op is torch.ops.sparsemix.row_adam_some else None
    rates = (RATES.lr, list(RATES.betas), RATES.eps, RATES.step)
    opcheck(op.default, (table, *moments, last, *sort_rows(grad.ids, M), grad.coef, grad.vec, *rates, 0.5, impl))


@pytest.mark.parametrize("step", [some_rows_, all_rows_])
def test_a_step_counts_what_the_gradient_costs_and_autograd_must_not_see_it(step):
    grad, (M, D) = lookup("odd")
    table, moments = state(M, D, by_row=True)
    order, before = sort_rows(grad.ids, M), table.clone()
    assert count_flops(lambda: step(table, moments, grad, order, RATES)) == 2 * grad.ids.numel() * D
    assert table._version == 1 and not torch.equal(table, before)
    kept = table.clone()
    with pytest.raises(RuntimeError, match="take it under"):
        step(table.requires_grad_(), moments, grad, order, RATES)
    assert torch.equal(table.detach(), kept)


@each_impl
def test_autocast_leaves_the_step_as_it_is(impl):
    grad, (M, D) = lookup("odd")
    table, moments = state(M, D, by_row=False)
    found = []
    for enabled in (False, True):
        w, new = copied(table, moments)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            some_rows_(w, new, grad, sort_rows(grad.ids, M, impl), RATES, impl=impl)
        found.append((w, *new))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
