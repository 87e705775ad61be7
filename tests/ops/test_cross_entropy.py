import math
import sys
from pathlib import Path

import pytest
import torch
from compare import randn
from torch.library import opcheck
from torch.nn import functional as F

from sparsemix.ops import cross_entropy as op
from sparsemix.ops.cross_entropy import reference
from sparsemix.ops.flop_counter import count_flops
from sparsemix.ops.impl import Kernels

sys.path.append(str(Path(__file__).parents[1] / "layers"))
from memory import allocated

SIZES = [(63, 131, 10), (7, 3, 1), (1, 1, 1), (5, 640, 63), (3, 5000, 2), (0, 4, 2)]
KERNELS = [
    impl
    for impl in ("native", "triton")
    if Kernels("", op.SOURCE, triton=True).refuses(impl, "cpu", torch.float32) is None
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few tokens, the last one ragged."""
    monkeypatch.setattr(op, "MAX_LOGITS", {"cpu": 1000})


def case(N, V, D, dtype=torch.float64, no_target=3):
    """Every third token has no target."""
    targets = torch.randint(V, (N,))
    targets[2::no_target] = -100
    return randn(N, D).to(dtype).requires_grad_(), randn(V, D).to(dtype).requires_grad_(), targets


def run(form, hidden, weight, targets, *more):
    """(mean, nats, gradients of three times the mean)"""
    mean, nats = form(hidden, weight, targets, *more)
    return mean, nats, *torch.autograd.grad(3 * mean, (hidden, weight), materialize_grads=True)


def exact(hidden, weight, targets):
    return run(reference.cross_entropy, *(x.detach().double().requires_grad_() for x in (hidden, weight)), targets)


def test_it_is_minus_the_log_of_the_share_of_the_target():
    hidden, weight, targets = case(4, 3, 2)
    hidden, weight = hidden.detach(), weight.detach()
    mean, nats = op.cross_entropy(hidden, weight, targets)
    wanted = []
    for n, target in enumerate(targets.tolist()):
        scores = [math.exp(sum(float(hidden[n, d] * weight[v, d]) for d in range(2))) for v in range(3)]
        wanted.append(0.0 if target == -100 else -math.log(scores[target] / sum(scores)))
    assert nats.tolist() == pytest.approx(wanted, abs=1e-12)
    assert float(mean) == pytest.approx(sum(wanted) / 3, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_op_is_its_reference_with_all_gradients(size):
    hidden, weight, targets = case(*size)
    mine, wanted = run(op.cross_entropy, hidden, weight, targets), exact(hidden, weight, targets)
    for got, want in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("impl", [*KERNELS, "torch"])
def test_every_kernel_is_the_reference_in_fp32(impl, size):
    hidden, weight, targets = case(*size, torch.float32)
    mine, wanted = run(op.cross_entropy, hidden, weight, targets, impl), exact(hidden, weight, targets)
    for got, want in zip(mine, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float())


def by_rounding(hidden, weight, targets):
    """What rounding of the logits and of their gradient explains of the largest errors of `run`, two eps of bf16 (four
    times what a rounding can be) in each, signs at random."""
    eps, known = torch.finfo(torch.bfloat16).eps, targets != -100
    hidden, weight = hidden.detach().double()[known], weight.detach().double()
    logits = hidden @ weight.T
    p = logits.softmax(-1)
    slope = p - F.one_hot(targets[known], len(weight))
    of_nats = (slope * logits).square().sum(-1)
    of_slope = 3 / len(hidden) * (p * (logits.abs() + (p * logits).norm(dim=-1, keepdim=True)) + slope.abs())
    of_hidden, of_weight = (of_slope.square() @ weight.square()), (of_slope.square().T @ hidden.square())
    found = of_nats.sum() / len(hidden) ** 2, of_nats, of_hidden, of_weight
    return [2 * eps * float(squares.max().sqrt()) for squares in found]


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("size", [(63, 131, 10), (40, 640, 63)])
def test_bf16_errs_at_most_twice_as_much_as_pytorch(impl, size):
    if impl not in [*KERNELS, "torch"]:
        pytest.skip("no C compiler here")

    def plain(hidden, weight, targets):
        logits = F.linear(hidden, weight).float()
        nats = F.cross_entropy(logits, targets, reduction="none")
        return nats.sum() / (targets != -100).sum(), nats

    hidden, weight, targets = case(*size, torch.bfloat16)
    wanted = exact(hidden, weight, targets)
    mine, theirs = run(op.cross_entropy, hidden, weight, targets, impl), run(plain, hidden, weight, targets)
    for got, other, want, limit in zip(mine, theirs, wanted, by_rounding(hidden, weight, targets), strict=True):
        assert got.dtype == other.dtype
        assert (got - want).abs().max() <= max(2 * (other - want).abs().max(), limit)


def test_triton_writes_bf16_gradients():
    hidden, weight, targets = case(7, 131, 10, torch.bfloat16)
    mine, wanted = run(op.cross_entropy, hidden, weight, targets, "triton"), exact(hidden, weight, targets)
    # The interpreter cuts fp32 to bf16 where a GPU rounds: 2^-7 of the largest value, and twice for a sum of them.
    for got, want in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * float(want.detach().abs().max()))


@pytest.mark.parametrize("impl", [*KERNELS, "torch"])
def test_extreme_logits_stay_finite_and_nan_shows(impl):
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    hidden, targets = torch.tensor([[1e4], [-1e4], [0.0]]), torch.tensor([1, 1, 2])
    mean, nats = op.cross_entropy(hidden, weight, targets, impl)
    torch.testing.assert_close(nats, torch.tensor([2e4, 0.0, math.log(3)]))
    assert mean.isfinite()
    hidden[1] = math.nan
    if impl == "triton":
        return  # its interpreter warns of NaN, and warnings are errors here
    assert op.cross_entropy(hidden, weight, targets, impl)[0].isnan()


def test_strided_operands_and_a_weight_that_is_tied():
    embed = randn(9, 22)[:, ::2].requires_grad_()
    tokens, targets = torch.randint(9, (12,)), torch.randint(9, (24,))[::2]

    def loss(form):
        hidden = F.embedding(tokens, embed).tanh()
        return torch.autograd.grad(form(hidden, embed, targets)[0], embed)[0]

    torch.testing.assert_close(loss(op.cross_entropy), loss(reference.cross_entropy), rtol=0, atol=1e-11)
    hidden = randn(11, 12).T.requires_grad_()
    mine, wanted = (run(f, hidden, embed, targets) for f in (op.cross_entropy, reference.cross_entropy))
    for got, want in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_without_any_target_the_mean_and_its_gradients_are_zero():
    hidden, weight, _ = case(5, 7, 3)
    mean, nats, *grads = run(op.cross_entropy, hidden, weight, torch.full((5,), -100))
    assert not mean.any() and not nats.any() and not any(g.any() for g in grads)


def test_autocast_multiplies_in_bf16_and_leaves_fp32_gradients():
    hidden, weight, targets = case(40, 131, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mean, nats, *grads = run(op.cross_entropy, hidden, weight, targets)
        logits = F.linear(hidden, weight)
    assert [t.dtype for t in (mean, nats, *grads)] == [torch.float32] * 4
    torch.testing.assert_close(nats, F.cross_entropy(logits.float(), targets, reduction="none").detach())
    wanted = exact(hidden, weight, targets)
    for got, want in zip(grads, wanted[2:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * float(want.detach().abs().max()))


@pytest.mark.skipif("native" not in KERNELS, reason="no C compiler here")
def test_the_kernel_is_equal_on_any_number_of_threads_and_near_on_the_oldest_processor(monkeypatch):
    logits, share = torch.randn(63, 131), torch.tensor(0.1)
    targets = case(63, 131, 1)[2]

    def chunk():
        gradient = logits.clone()
        return op._nats(gradient, targets, share, "native"), gradient

    one = chunk()
    torch.set_num_threads(2)
    try:
        two = chunk()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    for got, want in zip(chunk(), one, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_the_logits_of_all_tokens_are_never_in_memory(impl, monkeypatch):
    N, V, D = 512, 4096, 16
    monkeypatch.setattr(op, "MAX_LOGITS", {"cpu": 2**16})
    hidden, weight, targets = case(N, V, D, torch.float32)
    whole = 4 * N * V

    def plain():
        F.cross_entropy(F.linear(hidden, weight), targets).backward()

    work = allocated(lambda: op.cross_entropy(hidden, weight, targets, impl)[0].backward())
    assert work.largest < whole / 8 and work.peak < whole / 4
    control = allocated(plain)
    assert control.largest >= whole and control.peak >= 2 * whole


def test_it_costs_the_flops_of_the_plain_form():
    hidden, weight, targets = case(10, 7, 3)
    mine = count_flops(lambda: op.cross_entropy(hidden, weight, targets)[0].backward())
    plain = count_flops(lambda: reference.cross_entropy(hidden, weight, targets)[0].backward())
    assert mine == plain == 6 * 10 * 7 * 3
    with torch.no_grad():
        assert count_flops(lambda: op.cross_entropy(hidden, weight, targets)) == 2 * 10 * 7 * 3


@pytest.mark.parametrize("target", [7, -1])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_a_target_outside_the_vocabulary_is_refused(target, impl):
    hidden, weight, targets = case(5, 7, 3, torch.float32)
    targets[0] = target
    with pytest.raises(IndexError, match=r"none of the ids 0 to 6, nor -100 \(no target\)"):
        op.cross_entropy(hidden, weight, targets, impl)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_op_passes_torchs_own_checks(dtype):
    hidden, weight, targets = case(9, 7, 3, dtype)
    opcheck(torch.ops.sparsemix.cross_entropy.default, (hidden, weight, targets, dtype, True, "auto"))
    opcheck(
        torch.ops.sparsemix.cross_entropy.default, (hidden.detach(), weight.detach(), targets, dtype, False, "auto")
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32, torch.uint8, torch.bool], ids=str)
def test_labels_of_another_type_are_taken_or_refused_as_by_pytorch(dtype):
    hidden, weight, _ = case(5, 4, 3, torch.float32)
    targets = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    # Past the type checks of the tests.
    operands = hidden, weight, targets, torch.float32, False, "auto"
    try:
        wanted = F.cross_entropy(F.linear(hidden, weight), targets)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="expected scalar type Long for targets but found"):
            torch.ops.sparsemix.cross_entropy(*operands)
    else:
        torch.testing.assert_close(torch.ops.sparsemix.cross_entropy(*operands)[0], wanted)
