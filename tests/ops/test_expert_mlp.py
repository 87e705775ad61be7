from functools import partial

import pytest
import torch
from compare import assert_rounded, poisoned, randn, sizes, usable
from torch.library import opcheck

from sparsemix.ops.build import ISAS
from sparsemix.ops.expert_mlp import expert_mlp
from sparsemix.ops.expert_mlp.reference import expert_mlp as reference
from sparsemix.ops.flop_counter import count_flops

FAST = ["native", "torch", "triton"]
CASES = {
    "empty_experts": ([7, 0, 13, 1, 0], 10, 3),
    "all_on_the_last": ([0, 0, 63], 5, 7),
    "one_expert": ([9], 3, 11),
    "width_one": ([1, 1, 1], 1, 1),
    "D_640": ([5, 0, 6], 640, 17),
    "whole_vectors": ([70, 3, 130, 16], 64, 48),
    "no_rows": ([0, 0], 4, 3),
}


def make(counts, D, F, gated=True, none=0, N=11):
    """Operands in fp64 of fp32 values: tokens, token_ids, gates, counts, first, down."""
    R, E = sum(counts) + none, len(counts)
    first = randn(E, (1 + gated) * F, D) * D**-0.5
    floats = [x.bfloat16().double() for x in (randn(N, D), torch.rand(R).double(), first, randn(E, D, F) * F**-0.5)]
    tokens, gates, first, down = floats
    return [tokens, torch.randint(0, N, (R,)), gates, torch.tensor(counts), first, down]


def run(op, operands, dtype, *settings):
    """The output and the gradients of tokens, gates, first and down."""
    operands = [x.detach().to(dtype) if x.is_floating_point() else x for x in operands]
    moving = [x.requires_grad_() for x in operands if x.is_floating_point()]
    y = op(*operands, *settings)
    return y, *torch.autograd.grad(y, moving, direction_of(y).to(dtype))


def direction_of(y):
    """The same in every call for an output of this shape."""
    return torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_experts_are_their_reference_with_all_gradients(case, gated, act):
    operands = make(*case, gated=gated, none=2)
    wanted = run(reference, operands, torch.double, act)
    for got, want in zip(run(expert_mlp, operands, torch.double, act), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    for impl in FAST:
        with poisoned():
            found = run(expert_mlp, operands, torch.float32, act, impl)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want.float())


def assert_each_rounded(found, exact, operands, others=(None,) * 5):
    """The output and the gradients of `run` err by rounding: relu of squares bounds every activation's terms."""
    counts, _, down = operands[3:]
    summands = down.shape[1] + down.shape[2] + int(counts.sum())
    size = sizes(partial(reference, act="relu"), operands, direction_of(exact[0]))
    for got, want, s, other in zip(found, exact, size, others, strict=True):
        assert_rounded(got, want, s, found[0].dtype, summands, other)


@pytest.mark.parametrize("impl", FAST)
def test_gelu_by_tanh_of_huge_numbers_is_a_ramp(impl):
    huge = torch.tensor([-1e30, -1e15, -20.0, -14.9, 14.9, 20.0, 1e15, 1e30])[:, None]
    one, ids = torch.ones(1, 1, 1), torch.arange(8)
    tokens = huge.clone().requires_grad_()
    y = expert_mlp(tokens, ids, torch.ones(8), torch.tensor([8]), one, one, "gelu_tanh", impl)
    torch.testing.assert_close(y, huge.clamp(min=0))
    y.sum().backward()
    wanted = (huge > 0).float()
    # PyTorch's own cubes what is huge, and its slope there is no number.
    finite = slice(1, -1) if impl == "torch" else slice(None)
    torch.testing.assert_close(tokens.grad[finite], wanted[finite])


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gelu_by_tanh_is_its_reference_and_in_fp32_no_further_from_it_than_pytorch(case, gated):
    # The sums over a bank's rows, not the activation, are what assert_close's default finds 5 % too far, in both.
    operands = make(*case, gated=gated, none=2)
    wanted = run(reference, operands, torch.double, "gelu_tanh")
    for got, want in zip(run(expert_mlp, operands, torch.double, "gelu_tanh"), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    native, theirs, triton = (run(expert_mlp, operands, torch.float32, "gelu_tanh", impl) for impl in FAST)
    assert_each_rounded(native, wanted, operands, theirs)
    assert_each_rounded(triton, wanted, operands, theirs)
    assert_each_rounded(theirs, wanted, operands)


# Not the smallest: three numbers' rounding is luck.
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "width_one"])
def test_low_precision_errs_no_more_than_plain_products(case, act, impl):
    operands = make(*CASES[case])
    exact = run(reference, operands, torch.double, act)
    plain = run(reference, operands, torch.bfloat16, act)
    found = run(expert_mlp, operands, torch.bfloat16, act, impl)
    assert all(got.dtype == torch.bfloat16 for got in found)
    assert_each_rounded(found, exact, operands, plain)


# Past the tiles, panels and blocks of every build: odd sums, odd rows, more rows than are packed at a time, one row.
LOW_CASES = {
    "odd_everything": ([33, 1, 0, 15], 67, 35),
    "all_on_the_first": ([601, 0], 33, 15),
    "many_and_one": ([1, 1101], 19, 37),
    "wide": ([5, 0, 31], 290, 301),
    "one_row_each": ([1, 0, 1, 1, 1, 1], 35, 65),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("case", LOW_CASES.values(), ids=LOW_CASES)
def test_low_precision_of_every_instruction_set_errs_no_more_than_plain_products(case, gated, isa, monkeypatch):
    usable(isa, monkeypatch)
    operands = make(*case, gated=gated, none=2, N=sum(case[0]) // 2 + 3)
    exact, plain = (run(reference, operands, dtype, "silu") for dtype in (torch.double, torch.bfloat16))
    with poisoned():
        found = run(expert_mlp, operands, torch.bfloat16, "silu", "native")
    assert_each_rounded(found, exact, operands, plain)


def test_picks_of_no_expert_add_nothing_cost_nothing_and_take_no_gradient():
    operands = make([2, 0, 3], 8, 4, none=4)
    short = [operands[0], operands[1][:5], operands[2][:5], *operands[3:]]
    for impl in FAST:
        y, _, d_gates, *_ = run(expert_mlp, operands, torch.float32, "silu", impl)
        torch.testing.assert_close(y, run(expert_mlp, short, torch.float32, "silu", impl)[0])
        assert d_gates[5:].abs().max() == 0
        low = [x.float() if x.is_floating_point() else x for x in operands]
        assert count_flops(lambda low=low, impl=impl: expert_mlp(*low, "silu", impl)) == 2 * 5 * 3 * 8 * 4


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_large_inputs_saturate_as_torch_does(impl):
    operands = make([6, 5], 8, 4)
    operands[0] = operands[0] * 1000
    for act in ("silu", "gelu"):
        wanted = run(reference, operands, torch.double, act)
        for got, want in zip(run(expert_mlp, operands, torch.float32, act, impl), wanted, strict=True):
            torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype):
    operands = make([70, 0, 33, 600], 24, 20)
    one = run(expert_mlp, operands, dtype, "silu", "native")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            more = run(expert_mlp, operands, dtype, "silu", "native")
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True))


def test_instruction_sets_change_only_rounding(monkeypatch):
    operands = make([70, 0, 33, 200], 24, 20)
    one = run(expert_mlp, operands, torch.float32, "silu", "native")
    monkeypatch.setenv("SPARSEMIX_ISA", next(iter(ISAS)))
    for got, want in zip(run(expert_mlp, operands, torch.float32, "silu", "native"), one, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", FAST)
def test_only_the_asked_gradients_are_computed(impl):
    operands = [x.float() if x.is_floating_point() else x for x in make([4, 0, 5], 8, 4)]
    wanted = run(expert_mlp, operands, torch.float32, "silu", impl)[1:]
    for i, want in zip((0, 2, 4, 5), wanted, strict=True):
        moving = operands[i].clone().requires_grad_()
        y = expert_mlp(*operands[:i], moving, *operands[i + 1 :], "silu", impl)
        torch.manual_seed(1)
        (got,) = torch.autograd.grad(y, moving, randn(*y.shape).bfloat16().float())
        torch.testing.assert_close(got, want)


def far_apart(x):
    """The same values with 2^30 elements from one entry of the first axis to the next; most of it is never mapped."""
    space = torch.empty(len(x) * 2**30, dtype=x.dtype).as_strided(x.shape, (2**30, *x[0].contiguous().stride()))
    return space.copy_(x)


def test_triton_finds_tokens_and_experts_beyond_two_to_the_31_elements():
    operands = [x.bfloat16() if x.is_floating_point() else x for x in make([3, 0, 4], 6, 5, N=3)]
    moving = [operands[0], *operands[4:]]
    apart = [operands[0], *operands[1:4], *operands[4:]]
    apart[0], apart[4], apart[5] = map(far_apart, moving)

    def results(tokens, ids, gates, counts, first, down):
        y, pre = torch.ops.sparsemix.expert_mlp(tokens, ids, gates, counts, first, down, "silu", True, "triton")
        dy = far_apart(y) if tokens.stride(0) > 6 else y
        given = dy, pre, tokens, ids, gates, counts, first, down, "silu", [True] * 3, "triton"
        return y, *torch.ops.sparsemix.expert_mlp_backward(*given)

    assert all(torch.equal(a, b) for a, b in zip(results(*apart), results(*operands), strict=True))


def test_backward_keeps_the_first_products_rows_alone():
    operands = [x.float().requires_grad_() if x.is_floating_point() else x for x in make([64, 64], 32, 8)]
    given, kept = {x.data_ptr() for x in operands}, []

    def pack(x):
        if x.data_ptr() not in given:
            kept.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        expert_mlp(*operands, "silu", "native")
    assert kept == [128 * 16 * 4]


def test_autocast_gives_bf16_and_gradients_in_the_dtype_of_the_inputs():
    operands = [x.float() if x.is_floating_point() else x for x in make([4, 5], 16, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, *grads = run(expert_mlp, operands, torch.float32, "silu")
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)


def test_torch_accepts_the_experts_as_an_op():
    operands = [x.float() if x.is_floating_point() else x for x in make([2, 0, 3], 8, 4)]
    moving = [x.requires_grad_() if x.is_floating_point() else x for x in operands]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    opcheck(torch.ops.sparsemix.expert_mlp.default, (*moving, "silu", True, "native"), test_utils=tests)


@pytest.mark.parametrize(("counts", "last"), [([4, 6, 0], 10), ([4, -1, 0], 10), ([4, 5, 0], 11), ([4, 5, 0], -1)])
def test_a_pick_of_no_token_and_counts_past_the_picks_are_errors(counts, last):
    ids = torch.tensor([*range(8), last])
    weights = torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    with pytest.raises(IndexError if last in (11, -1) else ValueError, match="row"):
        expert_mlp(torch.randn(11, 4), ids, torch.rand(9), torch.tensor(counts), *weights, "silu", "native")
