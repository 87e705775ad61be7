"""The op from queries and keys to the best product keys, every implementation against the reference."""

import pytest
import torch
from compare import assert_rounded, poisoned, randn
from torch.library import opcheck

from sparsemix.errors import ConfigError
from sparsemix.ops import product_key_topk as package
from sparsemix.ops.product_key_topk import best_pairs, product_key_topk
from sparsemix.ops.product_key_topk import reference as references

CASES = [(63, 2, 16, 5, 7), (7, 3, 4, 1, 16), (1, 1, 1, 1, 1), (5, 2, 31, 16, 32), (0, 2, 3, 2, 4)]
shared_or_not = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_head"])


def inputs(N, H, n, C, shared, draw=randn):
    return draw(N, H, 2, C), draw(*(() if shared else (H,)), 2, n, C)


@shared_or_not
@pytest.mark.parametrize(("N", "H", "n", "C", "k"), CASES)
def test_product_key_topk_is_its_reference_with_all_gradients(N, H, n, C, k, shared):
    query, keys = (x.requires_grad_() for x in inputs(N, H, n, C, shared))
    got, want = product_key_topk(query, keys, k), references.product_key_topk(query, keys, k)
    for mine, theirs in zip(got[2:], want[2:], strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    weights = [torch.randn_like(side) for side in want[:2]]
    grads = []
    for out in (got, want):
        torch.testing.assert_close(out[0], want[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(out[1], want[1], rtol=0, atol=1e-11)
        grads.append(torch.autograd.grad((out[0] * weights[0] + out[1] * weights[1]).sum(), [query, keys]))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@shared_or_not
def test_ties_between_whole_keys_are_settled_as_in_the_reference(shared):
    def whole(*shape):
        return torch.randint(-1, 2, shape).double()

    query, keys = inputs(40, 2, 12, 3, shared, whole)
    for got, want in zip(product_key_topk(query, keys, 9), references.product_key_topk(query, keys, 9), strict=True):
        assert torch.equal(got, want)


@shared_or_not
def test_one_side_alone_passes_its_gradient_on(shared):
    query, keys = (x.requires_grad_() for x in inputs(9, 2, 6, 3, shared))
    for side in (0, 1):
        grads = [
            torch.autograd.grad(op(query, keys, 4)[side].square().sum(), [query, keys])
            for op in (product_key_topk, references.product_key_topk)
        ]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
        assert grads[0][0][:, :, 1 - side].abs().max() == 0


@shared_or_not
def test_gradients_are_finite_differences_while_the_picks_stay(shared):
    query, keys = (x.requires_grad_() for x in inputs(3, 2, 5, 2, shared))
    assert torch.autograd.gradcheck(lambda q, c: product_key_topk(q, c, 4)[:2], (query, keys))


@shared_or_not
def test_chunks_of_tokens_change_nothing(shared, monkeypatch):
    query, keys = inputs(23, 2, 7, 3, shared)
    whole = product_key_topk(query, keys, 5)
    monkeypatch.setattr(package, "MAX_SCORES", 2 * 2 * 7 * 4)
    for got, want in zip(product_key_topk(query, keys, 5), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_scores_are_exact_whatever_the_input_and_autocast(impl):
    query, keys = (x.bfloat16().requires_grad_() for x in inputs(9, 2, 31, 8, True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left, right, i, j = product_key_topk(query, keys, 6, impl)
    wanted = references.product_key_topk(query.double(), keys.double(), 6)
    assert left.dtype == torch.float32
    assert torch.equal(i, wanted[2])
    assert torch.equal(j, wanted[3])
    torch.testing.assert_close(left.double(), wanted[0], rtol=1e-5, atol=1e-5)
    (left + right).sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.bfloat16


# Triton's interpreter takes a second for the smallest of them.
NATIVE = [*CASES, (9, 2, 1000, 10, 16), (3, 2, 7, 63, 49), (33, 1, 7, 3, 1), (2, 1, 130, 5, 300)]
TRITON = [(5, 1, 70, 17, 3), (1, 1, 1, 1, 1), (2, 2, 3, 2, 5), (0, 2, 3, 2, 4)]
kernels = pytest.mark.parametrize(
    ("impl", "sizes"), [("native", s) for s in NATIVE] + [("triton", s) for s in TRITON], ids=str
)


def eighths(*shape):
    """Numbers whose products and sums are exact in fp32, with many ties."""
    return torch.randint(-16, 17, shape).float() / 8


@shared_or_not
@kernels
def test_a_kernel_is_the_reference_with_all_gradients(impl, sizes, shared):
    *sizes, k = sizes
    query, keys = (x.requires_grad_() for x in inputs(*sizes, shared, eighths))
    with poisoned():
        got = product_key_topk(query, keys, k, impl)
    want = references.product_key_topk(query.double(), keys.double(), k)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.to(theirs), theirs)
    weight = torch.randn_like(want[0])
    grads = [torch.autograd.grad((out[0] * weight - out[1]).sum(), [query, keys]) for out in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_a_gradient_without_strides_is_the_reference(impl):
    query, keys = (x.requires_grad_() for x in inputs(4, 2, 6, 3, True, eighths))
    grads = [
        torch.autograd.grad(out[0].sum() + out[1].sum(), [query, keys])
        for out in (product_key_topk(query, keys, 4, impl), references.product_key_topk(query, keys, 4))
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("impl", ["torch", "native", "triton"])
def test_a_query_or_key_that_is_not_a_number_is_seen(impl):
    query, keys = inputs(5, 2, 9, 3, True, eighths)
    query[1, 0], keys[1, 4] = torch.nan, torch.nan
    got, want = product_key_topk(query, keys, 2, impl), references.product_key_topk(query, keys, 2)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert got[0][1, 0].isnan().all()
    assert (got[3][:, :, 0] == 4).sum() == 9


@shared_or_not
def test_the_native_kernel_takes_strided_inputs(shared):
    query, keys = inputs(4, 2, 6, 3, shared, eighths)
    strided = query.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), keys.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in strided)
    for got, want in zip(
        product_key_topk(*strided, 3, "native"), references.product_key_topk(query, keys, 3), strict=True
    ):
        assert torch.equal(got, want)


@shared_or_not
@pytest.mark.parametrize("C", [1, 8, 16, 32, 13])
def test_the_native_kernel_gives_the_same_with_any_number_of_threads(C, shared):
    # Enough picks a key that the tokens are cut into pieces.
    query, keys = (x.requires_grad_() for x in inputs(70, 2, 9, C, shared, eighths))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            out = product_key_topk(query, keys, 16, "native")
            found.append([*out, *torch.autograd.grad((out[0].square() + out[1] * 0.5).sum(), [query, keys])])
        finally:
            torch.set_num_threads(1)
    exact = references.product_key_topk(query.double(), keys.double(), 16)
    wanted = torch.autograd.grad((exact[0].square() + exact[1] * 0.5).sum(), [query, keys])
    for alone, together, want in zip(*found, [*exact, *wanted], strict=True):
        assert torch.equal(alone, together)
        torch.testing.assert_close(alone, want.to(alone), rtol=1e-5, atol=1e-5)


@shared_or_not
def test_every_instruction_set_gives_the_same(shared, monkeypatch):
    query, keys = inputs(21, 3, 77, 12, shared, eighths)
    widest = product_key_topk(query, keys, 16, "native")
    monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    for got, want in zip(product_key_topk(query, keys, 16, "native"), widest, strict=True):
        assert torch.equal(got, want)


def test_native_scores_are_as_exact_as_those_of_torch():
    query, keys = inputs(64, 4, 128, 256, True, torch.randn)
    exact = references.product_key_topk(query.double(), keys.double(), 8)
    mine, torchs = (product_key_topk(query, keys, 8, impl)[:2] for impl in ("native", "torch"))
    squares = torch.einsum("nhpc,pmc->pnhm", query.double().square(), keys.double().square())
    for side in range(2):
        size = squares[side].gather(-1, exact[2 + side]).sqrt()
        assert_rounded(mine[side], exact[side], size, torch.float32, 256, torchs[side])


def test_a_kernel_that_cannot_run_says_so():
    query, keys = inputs(2, 1, 20, 3, True)
    with pytest.raises(ConfigError, match=r"impl=native cannot run here: the kernel takes float32, not torch.float64"):
        product_key_topk(query, keys, 4, "native")
    with pytest.raises(ConfigError, match="k=300 exceeds 256"):
        product_key_topk(query.float(), keys.float(), 300, "triton")
    with pytest.raises(ConfigError, match="take queries, not scores"):
        best_pairs(torch.randn(2, 3), torch.randn(2, 3), 2, "triton")


@shared_or_not
@pytest.mark.parametrize(("impl", "dtype"), [("torch", torch.float64), ("native", torch.float32)], ids=str)
def test_torch_accepts_product_key_topk_as_an_op(shared, impl, dtype):
    query, keys = (x.to(dtype).requires_grad_() for x in inputs(3, 2, 5, 2, shared))
    # Without symbolic sizes: the table's number of rows would be one, and the tests' type checks want an int.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    opcheck(torch.ops.sparsemix.product_key_topk.default, (query, keys, 4, impl), test_utils=tests)
