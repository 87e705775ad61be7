import pytest
import torch
from compare import randn
from torch.library import opcheck

from sparsemix.ops import product_key_topk as package
from sparsemix.ops.product_key_topk import best_pairs, candidate_ranks, product_key_topk
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


def test_scores_are_exact_whatever_the_input_and_autocast():
    query, keys = (x.bfloat16().requires_grad_() for x in inputs(9, 2, 31, 8, True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left, right, i, j = product_key_topk(query, keys, 6)
    wanted = references.product_key_topk(query.double(), keys.double(), 6)
    assert left.dtype == torch.float32
    assert torch.equal(i, wanted[2])
    assert torch.equal(j, wanted[3])
    torch.testing.assert_close(left.double(), wanted[0], rtol=1e-5, atol=1e-5)
    (left + right).sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.bfloat16


@shared_or_not
def test_torch_accepts_product_key_topk_as_an_op(shared):
    query, keys = (x.requires_grad_() for x in inputs(3, 2, 5, 2, shared))
    # Without symbolic sizes: the table's number of rows would be one, and the tests' type checks want an int.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    opcheck(torch.ops.sparsemix.product_key_topk.default, (query, keys, 4), test_utils=tests)
