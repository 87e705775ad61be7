"""The products over looked-up table rows beside gather and einsum, an embedding bag, and the reference compiled."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsemix.bench.agreement import with_gradients
from sparsemix.bench.work import OURS, Case, Contender, Number, Work
from sparsemix.ops.row_dot import row_dot
from sparsemix.ops.row_mix import row_mix

Op = Callable[..., Tensor]


def cases(quick: bool) -> Iterator[Case]:
    """512 tokens, 128 rows each, of a table beyond the caches."""
    N, R, M, D = 512, 128, (2**14 if quick else 2**18), 256
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(M, (N, R), generator=generator)
    table = torch.randn(M, D, generator=generator).requires_grad_()
    x = torch.randn(N, D, generator=generator).requires_grad_()
    coef = torch.randn(N, R, generator=generator).requires_grad_()

    def gathered_dot(x: Tensor, table: Tensor) -> Tensor:
        return torch.einsum("nd,nrd->nr", x, table[ids])

    def gathered_mix(coef: Tensor, table: Tensor) -> Tensor:
        return torch.einsum("nr,nrd->nd", coef, table[ids])

    def bag(coef: Tensor, table: Tensor) -> Tensor:
        return F.embedding_bag(ids, table, mode="sum", per_sample_weights=coef)

    def summed_dot(x: Tensor, table: Tensor) -> Tensor:
        return (table[ids] * x[:, None]).sum(-1)

    def summed_mix(coef: Tensor, table: Tensor) -> Tensor:
        return (table[ids] * coef[..., None]).sum(1)

    dots: dict[str, Op] = {
        OURS: lambda x, table: row_dot(x, ids, table),
        "gather and einsum": gathered_dot,
        "reference, compiled": torch.compile(summed_dot),
    }
    mixes: dict[str, Op] = {
        OURS: lambda coef, table: row_mix(coef, ids, table),
        "gather and einsum": gathered_mix,
        "F.embedding_bag": bag,
        "reference, compiled": torch.compile(summed_mix),
    }
    settings, amounts = {"N": N, "R": R, "rows": M, "D": D}, {"random_rows": 4.0 * N * R * D}
    for name, ops, leaves in (
        ("row_dot", dots, {"x": x, "table": table}),
        ("row_mix", mixes, {"coef": coef, "table": table}),
    ):
        yield row_case(name, ops, leaves, False, settings, amounts)
        yield row_case(f"{name} with gradients", ops, leaves, True, settings, {})


def row_case(
    name: str,
    ops: dict[str, Op],
    leaves: dict[str, Tensor],
    backward: bool,
    settings: dict[str, int],
    amounts: dict[str, float],
) -> Case:
    def made(op: Op) -> Callable[[], Contender]:
        def forward() -> Tensor:
            with torch.no_grad():
                return op(*leaves.values())

        def both() -> dict[str, Tensor]:
            return with_gradients(op, leaves)

        return lambda: Contender(both if backward else forward, both)

    others = [other for other in ops if other != OURS]
    numbers = [Number(f"row_ops/{name}, {other}", f"times as fast as {other}", (other,)) for other in others]
    return Case(name, {n: made(op) for n, op in ops.items()}, numbers, settings, amounts, budget_s=3)


WORKS = (Work("row_ops", "products over looked-up rows", cases),)
