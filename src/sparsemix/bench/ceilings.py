"""What this machine can do at most: matrix products, and reading memory in order or by random rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsemix.bench.timing import interleave
from sparsemix.bench.work import number_row
from sparsemix.ops import build, native

SOURCE = Path(__file__).with_name("ceilings.c")
UNITS = {"gemm_fp32": "FLOP/s", "gemm_bf16": "FLOP/s", "sequential_read": "B/s", "random_rows": "B/s"}
COLUMNS = 256


def read_rows(table: Float[Tensor, "M D"], ids: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """The sum of every looked-up row: reads them and hardly computes. Without a C compiler through torch."""
    if build.unusable(SOURCE):
        bags = torch.arange(0, len(ids), device=ids.device)
        return F.embedding_bag(ids, table, bags, mode="sum").sum(1)
    out = table.new_empty(len(ids))
    native.call(SOURCE, "read_rows", table, ids, out, len(ids), table.shape[1])
    return out


def read_sequential(table: Float[Tensor, "M D"]) -> Tensor:
    """The sum of all, one part a thread."""
    if build.unusable(SOURCE):
        return table.sum()
    out = table.new_empty(torch.get_num_threads())
    native.call(SOURCE, "read_sequential", table, out, table.numel())
    return out


@dataclass(frozen=True)
class Ceiling:
    """One ceiling: `amount` bytes or FLOPs a call of `make()`."""

    name: str
    amount: float
    make: Callable[[], Callable[[], object]]

    def measure(self, quick: bool) -> dict[str, Any]:
        timing = interleave({self.name: self.make()}, 0.3 if quick else 2.0)[self.name]
        unit = UNITS[self.name]
        row = number_row(f"ceilings/{self.name}", unit, self.amount / timing.min_s)
        contenders = {self.name: {"said": "ok", **timing._asdict()}}
        return {"name": self.name, "settings": {}, "amounts": {}, "contenders": contenders, "numbers": [row]}


def cases(quick: bool) -> Iterator[Ceiling]:
    """GEMM in fp32 and bf16, and reads of a 1 GiB table of 1 KiB rows (quick: 256 MiB)."""
    size, num_rows = (512, 2**18) if quick else (2048, 2**20)

    def product(dtype: torch.dtype) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            return lambda: F.linear(a, b)

        return make

    def sequential() -> Callable[[], object]:
        table = torch.ones(num_rows, COLUMNS)
        return lambda: read_sequential(table)

    def random() -> Callable[[], object]:
        # Huge pages, as the layers' tables have them.
        table, ids = torch.empty(num_rows, COLUMNS), torch.randint(num_rows, (2**16,))
        native.huge_pages(table)
        table.fill_(1.0)
        return lambda: read_rows(table, ids)

    yield Ceiling("gemm_fp32", 2.0 * size**3, product(torch.float32))
    yield Ceiling("gemm_bf16", 2.0 * size**3, product(torch.bfloat16))
    yield Ceiling("sequential_read", 4.0 * num_rows * COLUMNS, sequential)
    yield Ceiling("random_rows", 4.0 * 2**16 * COLUMNS, random)


def known(works: dict[str, Any]) -> dict[str, float]:
    """The ceilings among measured works, by name."""
    rows = [row for case in works.get("ceilings", {}).get("cases", []) for row in case["numbers"]]
    return {row["id"].partition("/")[2]: row["value"] for row in rows}
