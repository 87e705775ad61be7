"""Decoding with ternary weights: one row against packed codes, weights read from memory every time."""

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsemix.bench.work import OURS, Case, Contender, Number, Work
from sparsemix.ops.ternary_mm import ternary_mm
from sparsemix.ops.ternary_mm.pack import pack_rows

SIDE = 2048
# Together far beyond the last cache in either form; bf16 takes 8 MiB a matrix, two bits 1 MiB.
BYTES = 2**28


def cases(quick: bool) -> Iterator[Case]:
    """One row through matrices that take turns, so that none is in a cache."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(-127, 128, (1, SIDE), dtype=torch.int8, generator=generator)
    codes = torch.randint(-1, 2, (SIDE, SIDE), dtype=torch.int8, generator=generator)

    def turning(weights: list[Tensor], product: Callable[[Tensor], Tensor]) -> Contender:
        following = cycle(weights)
        return Contender(lambda: product(next(following)), lambda: {"output": product(weights[0])})

    def ours() -> Contender:
        weight = pack_rows(codes)
        weights = [weight.clone() for _ in range(BYTES // weight.numel() // (8 if quick else 1))]
        return turning(weights, lambda weight: ternary_mm(row, weight))

    def linear(dtype: torch.dtype) -> Callable[[], Contender]:
        def make() -> Contender:
            x, weight = row.to(dtype), codes.to(dtype)
            count = BYTES // (weight.numel() * dtype.itemsize) // (4 if quick else 1)
            return turning([weight.clone() for _ in range(count)], lambda weight: F.linear(x, weight))

        return make

    bf16, fp32 = "bf16 F.linear", "fp32 F.linear"
    yield Case(
        "one row",
        {OURS: ours, bf16: linear(torch.bfloat16), fp32: linear(torch.float32)},
        [
            Number("ternary_mm/one row", f"times as fast as {bf16}", (bf16,)),
            Number("ternary_mm/one row fp32", f"times as fast as {fp32}", (fp32,)),
        ],
        {"rows": 1, "side": SIDE},
        {"sequential_read": SIDE * SIDE / 4},
        # bf16 rounds its output.
        tolerance=1e-2,
    )


WORKS = (Work("ternary_mm", "ternary product at decoding", cases, ("ternary_mm/one row",)),)
