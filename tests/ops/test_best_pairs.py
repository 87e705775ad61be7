"""The best pairs of two lists of scores, against every pair, sorted."""

import pytest
import torch
from compare import usable

from sparsemix.ops import build
from sparsemix.ops.product_key_topk import best_pairs, candidate_ranks, selection
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


@pytest.mark.parametrize("isa", build.ISAS)
@pytest.mark.parametrize("kind", ["distinct", "infinite", "nan"])
@pytest.mark.parametrize(("n", "k"), [(31, 5), (128, 128), (1000, 32), (1024, 16), (700, 200)])
def test_every_instruction_set_selects_the_same(n, k, kind, isa, monkeypatch):
    usable(isa, monkeypatch)
    left, right = awkward_scores(kind, 37, n)
    wanted = selection.best_pairs(left, right, k)
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
