"""GPU kernels: one keeps the best keys of each side while the scores pass by, one merges the two lists.

Scores travel with their index in one integer, so that every comparison of two is the whole order: larger first, NaN
above all, -0 as 0, equal ones by index. Kernels call kernels, which the interpreter finds only if the tests' type
checks leave them bare: `no_type_check`. It takes no loop bound that is no constant either."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below every score


@triton.jit
@no_type_check
def packed(score, index):
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
@no_type_check
def score_of(pack):
    order = (pack >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def index_of(pack):
    return 0x7FFFFFFF - (pack & 0x7FFFFFFF)


@triton.jit
@no_type_check
def best_of_side(
    query,
    keys,
    best,
    N,
    groups,
    n: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """best[side, row] = the K best keys of BM queries of one set of keys, packed, falling."""
    g, side = (tl.program_id(1) // 2).to(tl.int64), (tl.program_id(1) % 2).to(tl.int64)
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = at.to(tl.int64) * groups + g
    query += (rows[:, None] * 2 + side) * C
    keys += (g * 2 + side) * n * C
    kept = tl.full((BM, K), LOWEST, tl.int64)  # rising
    for start in range(0, n, BN):
        key = start + tl.arange(0, BN)
        scores = tl.zeros((BM, BN), tl.float32)
        for c in range(0, C, BC):
            channel = c + tl.arange(0, BC)
            q = tl.load(query + channel[None, :], mask=(at < N)[:, None] & (channel < C)[None, :], other=0.0)
            seen = (channel < C)[:, None] & (key < n)[None, :]
            w = tl.load(keys + key.to(tl.int64)[None, :] * C + channel[:, None], mask=seen, other=0.0)
            scores = tl.dot(q, w, scores, input_precision="ieee")
        new = tl.where((key < n)[None, :], packed(scores, key[None, :]), LOWEST)
        # A falling list against a rising one: the larger of each pair are the K best of both, in bitonic order.
        kept = tl.bitonic_merge(tl.maximum(kept, tl.topk(new, K)))
    kept = tl.bitonic_merge(kept, descending=True)
    out = best + ((side * N * groups + rows) * K)[:, None] + tl.arange(0, K)[None, :]
    tl.store(out, kept, mask=(at < N)[:, None])


@triton.jit
@no_type_check
def merge_sides(
    best,
    left,
    right,
    i,
    j,
    rows,
    side: tl.constexpr,
    k: tl.constexpr,
    K: tl.constexpr,
    KOUT: tl.constexpr,
    BM: tl.constexpr,
):
    """The k best sums of both lists of BM queries, each of `side` scores -> left, right, i, j [row, k]."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    rank = tl.arange(0, KOUT)
    real = (row < rows)[:, None]
    lefts, rights = best + row * K, best + (rows + row) * K
    listed = real & (rank < side)[None, :]
    scores = score_of(tl.load(rights[:, None] + rank[None, :], mask=listed, other=0))
    kept = tl.full((BM, KOUT), LOWEST, tl.int64)  # rising
    for a in range(side):
        score = score_of(tl.load(lefts + a, mask=row < rows, other=0))
        new = packed(score[:, None] + scores, a * KOUT + rank[None, :])
        # The sums with one left score fall as the right scores do.
        kept = tl.bitonic_merge(tl.maximum(kept, tl.where(listed, new, LOWEST)))
    pair = index_of(tl.bitonic_merge(kept, descending=True))
    written = real & (rank < k)[None, :]
    from_left = tl.load(lefts[:, None] + pair // KOUT, mask=written, other=0)
    from_right = tl.load(rights[:, None] + pair % KOUT, mask=written, other=0)
    out = row[:, None] * k + rank[None, :]
    tl.store(left + out, score_of(from_left), mask=written)
    tl.store(right + out, score_of(from_right), mask=written)
    tl.store(i + out, index_of(from_left), mask=written)
    tl.store(j + out, index_of(from_right), mask=written)


def product_key_topk(query: Tensor, keys: Tensor, k: int, left: Tensor, right: Tensor, i: Tensor, j: Tensor) -> None:
    N, H, _, C = query.shape
    n, side = keys.shape[-2], min(k, keys.shape[-2])
    if query.numel() == 0:
        return
    # With shared keys the heads' queries are as many queries of one head.
    rows, groups = (N * H, 1) if keys.ndim == 3 else (N, H)
    K, KOUT = (max(2, int(triton.next_power_of_2(x))) for x in (side, k))
    BM, BN, BC = (32 if K <= 64 else 16), max(64, K), max(16, min(64, triton.next_power_of_2(C)))
    best = torch.empty(2, N * H, K, dtype=torch.long, device=query.device)
    best_of_side[triton.cdiv(rows, BM), 2 * groups](
        query.contiguous(), keys.contiguous(), best, rows, groups, n, C, K, BM, BN, BC
    )
    BM = max(1, 512 // KOUT)
    merge_sides[(triton.cdiv(N * H, BM),)](best, left, right, i, j, N * H, side, k, K, KOUT, BM)
