"""Is an op its reference, in the output and in every gradient?"""

import contextlib

import pytest
import torch

from sparsemix.ops import build


def assert_same(op, reference, *inputs, expanded=False):
    """Both in fp64, to 1e-11. `expanded` sends back a gradient of stride 0, as .sum() does."""
    moving = [x for x in inputs if x.is_floating_point()]
    for x in moving:
        assert x.dtype == torch.float64
        x.requires_grad_()
    out, wanted = op(*inputs), reference(*inputs)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)
    grad = torch.ones((), dtype=out.dtype).expand_as(out) if expanded else torch.randn_like(out)
    grads, wanted_grads = (torch.autograd.grad(y, moving, grad) for y in (out, wanted))
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def with_gradients(op, inputs, direction, dtype=None):
    """op(*inputs) and its gradients towards `direction`, all in fp64; floating inputs are cast to `dtype` first."""
    cast = [x.detach().to(dtype or x.dtype) if x.is_floating_point() else x for x in inputs]
    moving = [x.requires_grad_() for x in cast if x.is_floating_point()]
    out = op(*cast)
    found = [out, *torch.autograd.grad(out, moving, direction.to(out.dtype).expand_as(out))]
    return [x.detach().double() for x in found]


@contextlib.contextmanager
def poisoned():
    """Memory that is never written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_fp32_is(op, reference, *inputs, direction):
    """`op` in fp32 is `reference` in fp64 to the default tolerances of fp32."""
    with poisoned():
        mine = with_gradients(op, inputs, direction)
    for got, want in zip(mine, with_gradients(reference, inputs, direction, torch.float64), strict=True):
        torch.testing.assert_close(got.float(), want.float())


def sizes(reference, inputs, direction):
    """What the output and each gradient would be if their terms had random signs: the root of the same sums of squares.

    Rounding that is relative to a term is relative to this, also where the terms cancel. For chains of products and
    sums; an activation must be relu, which bounds the others."""
    squares = [x.detach().double().square() if x.is_floating_point() else x for x in inputs]
    return [x.sqrt() for x in with_gradients(reference, squares, direction.double().square())]


def assert_rounded(got, want, size, dtype, summands, other=None):
    """The norm of the error is what rounding explains on any processor: eps of the type times the size, as four of a
    chain's roundings add up to; and where sums are rounded in that type, sqrt(summands) eps more. Or it is at most
    twice that of `other`, another implementation: never that alone, whose luck depends on the processor."""
    eps = torch.finfo(dtype).eps
    limit = eps * (1 + (summands**0.5 if eps < 1e-4 else 0)) * float(size.norm())
    theirs = 0.0 if other is None else float((other.detach().double() - want.detach()).norm())
    mine = float((got.detach().double() - want.detach()).norm())
    assert mine <= max(2 * theirs, limit), f"error {mine:.3g}, another's {theirs:.3g}, by rounding {limit:.3g}"


def assert_errs_at_most_twice(op, theirs, reference, *inputs, direction, bound=None):
    """The error of `op` against `reference` in fp64 in 16 bit is at most twice that of `theirs`, or what rounding
    explains. `bound` is the reference with relu, where its activation is another."""
    exact = with_gradients(reference, inputs, direction, torch.float64)
    size = sizes(bound or reference, inputs, direction)
    with poisoned():
        mine = with_gradients(op, inputs, direction)
    for got, other, want, s in zip(mine, with_gradients(theirs, inputs, direction), exact, size, strict=True):
        assert_rounded(got, want, s, inputs[0].dtype, 1, other)


def usable(isa, monkeypatch):
    """Kernels are built for this instruction set, or the test is skipped."""
    if isa not in list(build.ISAS)[: list(build.ISAS).index(build.machine_isa()) + 1]:
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("SPARSEMIX_ISA", isa)
