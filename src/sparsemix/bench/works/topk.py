"""The k best product keys: from given scores, and with the scores."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsemix.bench.agreement import with_gradients
from sparsemix.bench.work import OURS, Case, Contender, Number, Work
from sparsemix.ops.product_key_topk import best_pairs, product_key_topk

HEADS, K, N, C = 8, 16, 1024, 128
OTHER = "torch.topk and full grid"


def grid(left: Tensor, right: Tensor) -> Tensor:
    """torch.topk of both sides, then of all k * k sums."""
    left, right = left.topk(K, dim=-1)[0], right.topk(K, dim=-1)[0]
    return (left[..., :, None] + right[..., None, :]).flatten(-2).topk(K, dim=-1)[0]


def picked(left: Tensor, right: Tensor) -> Tensor:
    i, j = best_pairs(left, right, K)
    return left.gather(-1, i) + right.gather(-1, j)


def scored_grid(query: Tensor, keys: Tensor) -> Tensor:
    return grid(*torch.einsum("nhpc,hpmc->pnhm", query, keys))


def found(query: Tensor, keys: Tensor) -> Tensor:
    left, right, *_ = product_key_topk(query, keys, K)
    return left + right


def cases(quick: bool) -> Iterator[Case]:
    """The choice among 8192 rows of scores a side; the same with the scores; and with gradients."""
    rows = 1024 if quick else 8192
    settings = {"rows": rows, "n": N, "k": K}
    sides = torch.randn(2, rows, N)
    operands = {"query": torch.randn(rows // HEADS, HEADS, 2, C), "keys": torch.randn(HEADS, 2, N, C) * C**-0.5}

    def choosing(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Contender]:
        return lambda: Contender(lambda: op(*sides), lambda: {"output": op(*sides)})

    def finding(op: Callable[[Tensor, Tensor], Tensor], backward: bool) -> Callable[[], Contender]:
        leaves = {name: x.clone().requires_grad_() for name, x in operands.items()}

        def forward() -> Tensor:
            with torch.no_grad():
                return op(*operands.values())

        def both() -> dict[str, Tensor]:
            return with_gradients(op, leaves)

        return lambda: Contender(both if backward else forward, both)

    def case(name: str, ours: Callable[[], Contender], theirs: Callable[[], Contender], **more: float) -> Case:
        number = Number(f"product_key_topk/{name}", f"times as fast as {OTHER}", (OTHER,))
        return Case(name, {OURS: ours, OTHER: theirs}, [number], settings, more)

    yield case("8192 rows", choosing(picked), choosing(grid), sequential_read=8.0 * rows * N)
    products = 4.0 * rows * N * C
    yield case("with scores of 128", finding(found, False), finding(scored_grid, False), gemm_fp32=products)
    yield case("with scores of 128 and gradients", finding(found, True), finding(scored_grid, True))


WORKS = (Work("product_key_topk", "the k best of n * n keys", cases, ("product_key_topk/8192 rows",)),)
