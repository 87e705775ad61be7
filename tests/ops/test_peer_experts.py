from functools import partial

import pytest
import torch
from compare import assert_errs_at_most_twice, assert_fp32_is, assert_same, randn
from torch.library import opcheck
from torch.nn import functional as F

from lookups import take_rows
from sparsemix.ops.peer_experts import peer_experts
from sparsemix.ops.peer_experts.reference import peer_experts as reference
from sparsemix.ops.row_grad import table_grad
from sparsemix.ops.row_grad.factored import lend

ACTIVATIONS = ["gelu", "relu", "silu"]
# Many tokens and few, odd sizes, groups of eight picks and what is left of them, rows longer than are summed at a time.
SIZES = [(1, 1, 1, 1), (0, 3, 4, 2), (20, 5, 16, 10), (13, 21, 40, 63), (2, 12, 9, 640), (9, 9, 7, 1090)]


def case(N, R, M, D, dtype=torch.float64):
    """x, ids, gates and both tables; products are of order 1, the first rows are picked most often."""
    ids = torch.multinomial(1 / torch.arange(1.0, M + 1), N * R + 1, replacement=True)[1:].view(N, R)
    tables = randn(M, D) * D**-0.5, randn(M, D) * D**-0.5
    gates = randn(N, R).to(torch.promote_types(dtype, torch.float32))
    return randn(N, D).to(dtype), ids, gates, *(table.to(dtype) for table in tables)


def test_it_is_the_loop_over_tokens_and_picks():
    x, ids, gates, w_in, w_out = case(4, 3, 5, 6)
    y = peer_experts(x, ids, gates, w_in, w_out)
    for n in range(4):
        wanted = sum(gates[n, r] * F.gelu(w_in[m] @ x[n]) * w_out[m] for r, m in enumerate(ids[n]))
        torch.testing.assert_close(y[n], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("expanded", [False, True], ids=["gradient", "stride_0_gradient"])
@pytest.mark.parametrize(("N", "R", "M", "D"), SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_its_reference_with_all_gradients(activation, N, R, M, D, expanded):
    op = partial(peer_experts, activation=activation)
    assert_same(op, partial(reference, activation=activation), *case(N, R, M, D), expanded=expanded)


@pytest.mark.parametrize(("N", "R", "M", "D"), SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_kernel_is_the_reference_with_all_gradients(impl, activation, N, R, M, D):
    op = partial(peer_experts, activation=activation, impl=impl)
    inputs = case(N, R, M, D, torch.float32)
    assert_fp32_is(op, partial(reference, activation=activation), *inputs, direction=randn(N, D))


# Not the smallest: one number's rounding is luck.
@pytest.mark.parametrize(("N", "R", "M", "D"), SIZES[2:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_kernel_errs_at_most_twice_as_much_as_gathers_in_bf16(impl, activation, N, R, M, D):
    op, exact = partial(peer_experts, activation=activation), partial(reference, activation=activation)
    inputs = case(N, R, M, D, torch.bfloat16)
    kernel, theirs = partial(op, impl=impl), partial(op, impl="reference")
    bound = partial(reference, activation="relu")
    assert_errs_at_most_twice(kernel, theirs, exact, *inputs, direction=randn(N, D), bound=bound)


@pytest.mark.parametrize("kernel", ["native", "portable", "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_slopes_are_exact_over_their_whole_range(activation, kernel, monkeypatch):
    if kernel == "portable":
        monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    impl, points = ("triton", 201) if kernel == "triton" else ("native", 4001)
    z = torch.cat([torch.linspace(-20, 20, points), torch.tensor([0.0, -0.0, -1e-30, 1e30, -1e30, 88.0, -88.0])])
    N = len(z)
    # x = z and w_in = w_out = 1: y = act(z), and its gradient is the slope.
    one, ids, gates = torch.ones(1, 1), torch.zeros(N, 1, dtype=torch.long), torch.ones(N, 1)

    def slope(op, dtype, **impl):
        x = z[:, None].to(dtype).requires_grad_()
        y = op(x, ids, gates.to(dtype), one.to(dtype), one.to(dtype), activation, **impl)
        return y.detach().float(), torch.autograd.grad(y.sum(), x)[0].float()

    mine, exact = slope(peer_experts, torch.float32, impl=impl), slope(reference, torch.float64)
    for got, want in zip(mine, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1.3e-6, atol=2e-7)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_what_is_not_a_number_stays_so(impl):
    z = torch.tensor([[float("nan")], [float("inf")]])
    for activation in ACTIVATIONS:
        inputs = z, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), torch.ones(1, 1), torch.ones(1, 1)
        y = peer_experts(*inputs, activation, impl=impl)
        assert y[0].isnan()
        assert y[1] == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_the_other_tokens_change_no_bit(dtype):
    x, ids, gates, *tables = case(40, 27, 50, 130, dtype)
    d_y = randn(40, 130).to(dtype)

    def both(tokens, threads):
        torch.set_num_threads(threads)
        try:
            mine = x[tokens], ids[tokens], gates[tokens]
            y, z = torch.ops.sparsemix.peer_experts(*mine, *tables, "gelu", False, "native")
            back = torch.ops.sparsemix.peer_experts_backward(d_y[tokens], *mine[1:], z, *tables, "gelu", "native")
        finally:
            torch.set_num_threads(1)
        return y, z, *back

    all_tokens = both(slice(None), 1)
    for tokens, threads in ((slice(None), 2), (slice(None), 3), (slice(7, 8), 1), (slice(7, 8), 2), (slice(3, 20), 3)):
        for got, want in zip(both(tokens, threads), all_tokens, strict=True):
            assert torch.equal(got, want[tokens])


@pytest.mark.parametrize("impl", ["torch", "native", "triton"])
def test_recorded_factors_are_the_dense_gradients(impl):
    x, ids, gates, w_in, w_out = case(7, 3, 9, 4, torch.float32)
    tables, direction = (w_in.requires_grad_(), w_out.requires_grad_()), randn(7, 4).float()
    wanted = torch.autograd.grad(peer_experts(x, ids, gates, w_in, w_out, impl=impl), tables, direction)
    for table in tables:
        lend(table, table)
    peer_experts(x, ids, gates, w_in, w_out, record=True, impl=impl).backward(direction)
    for table, want in zip(tables, wanted, strict=True):
        (left,) = take_rows(table)
        torch.testing.assert_close(table_grad(left.coef, left.ids, left.vec, 9), want)
        assert take_rows(table) == []


def test_nothing_is_recorded_for_tables_that_need_no_gradient():
    x, ids, gates, w_in, w_out = case(7, 3, 9, 4)
    lend(w_in, x)
    lend(w_out, x)
    peer_experts(x.requires_grad_(), ids, gates, w_in, w_out, record=True).sum().backward()
    assert take_rows(w_in) == take_rows(w_out) == []


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_two_to_the_31_elements_are_found(dtype, impl):
    D, M = 1024, 2**21 + 3
    # The pages of a row that nobody touches are never mapped.
    w_in, w_out = torch.empty(M, D, dtype=dtype), torch.empty(M, D, dtype=dtype)
    ids = torch.tensor([[0, M - 1], [M - 3, 1], [M - 2, M - 2]])
    rows = ids.unique()
    for table in (w_in, w_out):
        table[rows] = torch.randn(len(rows), D).to(dtype)
    x, gates, where = torch.randn(3, D).to(dtype), torch.randn(3, 2), torch.searchsorted(rows, ids)
    small = w_in[rows], w_out[rows]
    y = peer_experts(x, ids, gates, w_in, w_out, impl=impl)
    assert torch.equal(y, peer_experts(x, where, gates, *small, impl=impl))
    # Addresses that lost their upper bits would read row 0 instead of row M - 3.
    assert not torch.equal(y, peer_experts(x, torch.where(where == 2, 0, where), gates, *small, impl=impl))


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_it_computes_in_the_dtype_of_the_tables_whatever_autocast_says(impl):
    x, ids, gates, w_in, w_out = case(9, 3, 8, 16, torch.float32)
    x, gates = x.bfloat16().requires_grad_(), gates.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = peer_experts(x, ids, gates, w_in, w_out, impl=impl)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference(x.float(), ids, gates.float(), w_in, w_out, "gelu"))
    grads = torch.autograd.grad(y.sum(), [x, gates])
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_torch_accepts_the_op(impl):
    dtype = torch.float64 if impl == "torch" else torch.float32
    x, ids, gates, *tables = case(4, 3, 5, 6, dtype)
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in (x, ids, gates, *tables)]
    # Without symbolic sizes: num_rows would be one, and the tests' type checks want an int.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    opcheck(torch.ops.sparsemix.peer_experts.default, (*inputs, "gelu", False, impl), test_utils=tests)
    given = [t.detach() for t in (randn(4, 6).to(dtype), ids, gates, randn(4, 3).to(dtype), *tables)]
    opcheck(torch.ops.sparsemix.peer_experts_backward.default, (*given, "gelu", impl), test_utils=tests)
