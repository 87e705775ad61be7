import pytest
import torch
from torch.library import opcheck

from sparsemix.ops.product_key_topk import candidate_ranks, product_key_topk
from sparsemix.ops.product_key_topk.reference import product_key_topk as reference

SIDES = [1, 2, 3, 16, 31, 128]


def sizes():
    return [(n, k) for n in SIDES for k in sorted({1, 2, 5, 16, 32, n, n * n}) if k <= n * n]


def brute_force(left, right, k):
    """Every pair of one row, sorted: the larger sum first, then the better left rank, then the better right rank."""
    n = len(left)
    left_rank, right_rank = ({i: r for r, i in enumerate(sorted(range(n), key=lambda i: -s[i]))} for s in (left, right))
    pairs = [(i, j) for i in range(n) for j in range(n)]
    return sorted(pairs, key=lambda ij: (-(left[ij[0]] + right[ij[1]]), left_rank[ij[0]], right_rank[ij[1]]))[:k]


def scores(kind, rows, n):
    if kind == "distinct":
        return torch.randn(rows, n, dtype=torch.float64), torch.randn(rows, n, dtype=torch.float64)
    return tuple(torch.randint(0, 1 if kind == "constant" else 3, (rows, n)).double() for _ in range(2))


@pytest.mark.parametrize("kind", ["distinct", "heavy_ties", "constant"])
@pytest.mark.parametrize(("n", "k"), sizes())
def test_top_k_of_product_keys_is_brute_force_over_all_pairs(n, k, kind):
    left, right = scores(kind, 2, n)
    i, j = product_key_topk(left, right, k)
    for row in range(2):
        wanted = brute_force(left[row].tolist(), right[row].tolist(), k)
        assert list(zip(i[row].tolist(), j[row].tolist(), strict=True)) == wanted
    for got, want in zip((i, j), reference(left, right, k), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["distinct", "heavy_ties"])
def test_top_16_of_a_million_keys_is_brute_force(kind):
    left, right = scores(kind, 1, 1024)
    for got, want in zip(product_key_topk(left, right, 16), reference(left, right, 16), strict=True):
        assert torch.equal(got, want)


def test_every_leading_axis_and_stride_is_allowed():
    left, right = torch.randn(7, 3, 5, 2).mT, torch.randn(5, 7, 3, 2).permute(1, 2, 3, 0)
    assert not left.is_contiguous()
    assert not right.is_contiguous()
    for got, want in zip(product_key_topk(left, right, 4), reference(left, right, 4), strict=True):
        assert torch.equal(got, want)
        assert got.shape == (7, 3, 2, 4)


@pytest.mark.parametrize("k", [1, 2, 5, 16, 32, 100])
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


def test_torch_accepts_product_key_topk_as_an_op():
    opcheck(torch.ops.sparsemix.product_key_topk.default, (torch.randn(3, 2, 5), torch.randn(3, 2, 5), 4))
