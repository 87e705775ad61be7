import pytest
import torch
from compare import poisoned, randn
from torch.library import opcheck

from sparsemix.errors import ConfigError
from sparsemix.ops import product_key_topk as package
from sparsemix.ops.product_key_topk import best_pairs, candidate_ranks, product_key_topk, selection
from sparsemix.ops.product_key_topk import reference as references

SIDES = [1, 2, 3, 16, 31, 128]


def sizes():
    return [(n, k) for n in SIDES for k in sorted({1, 2, 5, 16, 32, n, n * n}) if k <= n * n]


def brute_force(left, right, k):
    """Every pair of one row, sorted: the larger sum first, then the better left rank, then the better right rank."""
    n = len(left)
    left_rank, right_rank = ({i: r for r, i in enumerate(sorted(range(n), key=lambda i: -s[i]))} for s in (left, right))
    pairs = [(i, j) for i in range(n) for j in range(n)]
    return sorted(pairs, key=lambda ij: (-(left[ij[0]] + right[ij[1]]), left_rank[ij[0]], right_rank[ij[1]]))[:k]


def scores(kind, rows, n, dtype=torch.float64):
    if kind == "distinct":
        return tuple(torch.randn(rows, n, dtype=torch.float64).to(dtype) for _ in range(2))
    if kind == "negative":
        return tuple(-1 - torch.rand(rows, n, dtype=torch.float64).to(dtype) for _ in range(2))
    return tuple(torch.randint(0, 1 if kind == "constant" else 3, (rows, n)).to(dtype) for _ in range(2))


@pytest.mark.parametrize("kind", ["distinct", "negative", "heavy_ties", "constant"])
@pytest.mark.parametrize(("n", "k"), sizes())
def test_top_k_of_product_keys_is_brute_force_over_all_pairs(n, k, kind):
    left, right = scores(kind, 2, n)
    i, j = best_pairs(left, right, k)
    for row in range(2):
        wanted = brute_force(left[row].tolist(), right[row].tolist(), k)
        assert list(zip(i[row].tolist(), j[row].tolist(), strict=True)) == wanted
    for got, want in zip((i, j), references.best_pairs(left, right, k), strict=True):
        assert torch.equal(got, want)


def awkward_scores(kind, rows, n):
    if kind in ("distinct", "heavy_ties", "constant"):
        return scores(kind, rows, n, torch.float32)
    left, right = scores("heavy_ties", rows, n, torch.float32)
    if kind == "signed_zeros":
        return left * 0, right * -0.0
    if kind == "infinite":
        left[:, ::3], right[:, 1::2] = -torch.inf, -torch.inf
        left[:, 2::7] = torch.inf
        right[0] = 1.0
        return left, torch.where(left.isinf().any(-1, keepdim=True) & right.isinf(), -1e38, right)
    left[:, ::5], left[:, 1::7], right[:, 2::3] = torch.nan, -torch.nan, torch.nan
    return left, right


AWKWARD = ["distinct", "heavy_ties", "constant", "signed_zeros", "infinite", "nan"]
LONG = [(1000, 1), (1024, 16), (1000, 32), (700, 200), (130, 400)]


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize(("n", "k"), sizes()[:-1] + LONG)
def test_the_native_selection_settles_everything_as_the_reference(n, k, kind):
    left, right = awkward_scores(kind, 19, n)
    # The selection of the torch path, itself compared with the reference above, forms no n * n sums.
    wanted = (references if n <= 128 else selection).best_pairs(left, right, k)
    for got, want in zip(best_pairs(left, right, k, impl="native"), wanted, strict=True):
        assert torch.equal(got, want)


def test_the_native_selection_takes_any_leading_axes_and_strides():
    left, right = torch.randn(7, 3, 5, 2).mT, torch.randn(5, 7, 3, 2).permute(1, 2, 3, 0)
    for got, want in zip(best_pairs(left, right, 4, "native"), references.best_pairs(left, right, 4), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["distinct", "heavy_ties"])
def test_top_16_of_a_million_keys_is_brute_force(kind):
    left, right = scores(kind, 1, 1024)
    for got, want in zip(best_pairs(left, right, 16), references.best_pairs(left, right, 16), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [3, 16, 31])
def test_sums_that_tie_by_rounding_are_settled_by_rank(dtype, n):
    left, right = scores("distinct", 50, n, dtype)
    for got, want in zip(best_pairs(left, right, n), references.best_pairs(left, right, n), strict=True):
        assert torch.equal(got, want)


def test_every_leading_axis_and_stride_is_allowed():
    left, right = torch.randn(7, 3, 5, 2).mT, torch.randn(5, 7, 3, 2).permute(1, 2, 3, 0)
    assert not left.is_contiguous()
    assert not right.is_contiguous()
    for got, want in zip(best_pairs(left, right, 4), references.best_pairs(left, right, 4), strict=True):
        assert torch.equal(got, want)
        assert got.shape == (7, 3, 2, 4)


def test_infinitely_bad_scores_come_last():
    left, right = scores("distinct", 20, 6)
    left[:, [1, 4]], right[:, 3] = -torch.inf, -torch.inf
    i, j = best_pairs(left, right, 36)
    # 4 * 5 pairs are finite.
    good = ~torch.isin(i, torch.tensor([1, 4])) & (j != 3)
    assert good[:, :20].all()
    assert not good[:, 20:].any()
    for got, want in zip((i, j), references.best_pairs(left, right, 36), strict=True):
        assert torch.equal(got, want)


def test_a_score_that_is_not_a_number_is_picked_first_so_that_it_shows():
    left, right = scores("distinct", 20, 6)
    left[:, [2, 5]] = torch.nan
    i, j = best_pairs(left, right, 13)
    assert i[:, :12].tolist() == [[2] * 6 + [5] * 6] * 20
    assert not torch.isin(i[:, 12], torch.tensor([2, 5])).any()
    for got, want in zip((i, j), references.best_pairs(left, right, 13), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 8, 16, 32, 64, 100, 128])
def test_only_pairs_that_can_win_are_formed(k):
    a, b = candidate_ranks(k, k)
    assert len(a) == sum(k // i for i in range(1, k + 1))
    assert int(((a + 1) * (b + 1)).max()) <= k
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(a)


def test_sixteen_winners_need_fifty_candidates():
    assert len(candidate_ranks(16, 16)[0]) == 50


def test_candidates_stay_below_a_short_side():
    a, b = candidate_ranks(9, 3)
    assert len(a) == 9
    assert int(a.max()) == int(b.max()) == 2


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


def test_the_native_kernel_gives_the_same_with_any_number_of_threads():
    query, keys = inputs(70, 2, 100, 13, False, torch.randn)
    alone = product_key_topk(query, keys, 16, "native")
    torch.set_num_threads(2)
    try:
        together = product_key_topk(query, keys, 16, "native")
    finally:
        torch.set_num_threads(1)
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


@shared_or_not
def test_every_instruction_set_gives_the_same(shared, monkeypatch):
    query, keys = inputs(21, 3, 77, 12, shared, eighths)
    widest = product_key_topk(query, keys, 16, "native")
    monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    for got, want in zip(product_key_topk(query, keys, 16, "native"), widest, strict=True):
        assert torch.equal(got, want)


def test_native_scores_are_as_exact_as_those_of_torch():
    query, keys = inputs(64, 4, 128, 256, True, torch.randn)
    exact = references.product_key_topk(query.double(), keys.double(), 8)[:2]
    errors = [
        sum((mine - theirs).abs().max() for mine, theirs in zip(product_key_topk(query, keys, 8, impl), exact))  # noqa: B905
        for impl in ("native", "torch")
    ]
    assert errors[0] <= 2 * errors[1]


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
