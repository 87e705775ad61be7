"""PEER: its step, its forward and its memory beside PEER-pytorch, and the product-key top-k alone."""

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsemix.bench import peers
from sparsemix.bench.ceilings import read_rows
from sparsemix.bench.training import Training, our_optimizer, twin_input
from sparsemix.bench.work import ABSENT, OURS, Case, Contender, Number, Unavailable, Work, free_gib, number_row
from sparsemix.evaluate.memory import PeakMemory
from sparsemix.layers import Layer
from sparsemix.layers.peer import PEER as PEERLayer
from sparsemix.layers.product_keys import Found, look_up
from sparsemix.ops.peer_experts import peer_experts
from sparsemix.optim import Moment

D, HEADS, K, D_KEY = 256, 8, 16, 256
PEER = "PEER-pytorch"
# Small enough to compare every gradient and three optimizer steps.
SMALL = (32**2, 64)


def layer_of(num_experts: int) -> Layer:
    torch.manual_seed(0)
    return peers.our_peer(num_experts, D, HEADS, K, D_KEY).train()


def side(quick: bool) -> int:
    return 256 if quick else 1024


def as_ours(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    return peers.peer_names(entry, HEADS)


def small_ours(optimize: bool) -> Training:
    layer = layer_of(SMALL[0])
    optimizer = our_optimizer(layer, catch_up=True) if optimize else None
    return Training(layer, twin_input(SMALL[1], D), optimizer)


def small_peer(optimize: bool) -> Training:
    layer = peers.peer_pytorch(layer_of(SMALL[0]))
    return Training(layer, twin_input(SMALL[1], D), peers.adam(layer, 1e-3) if optimize else None, as_ours)


def step_cases(quick: bool) -> Iterator[Case]:
    """Forward, backward and optimizer step at n * n experts."""
    n = side(quick)

    def ours(num_tokens: int, moment: Moment) -> Callable[[], Contender]:
        def make() -> Contender:
            layer = layer_of(n * n)
            run = Training(layer, twin_input(num_tokens, D), our_optimizer(layer, table_moment=moment)).step
            if moment != "full":
                return Contender(run)
            return Contender(run, small_ours(False).probe, small_ours(True).moved)

        return make

    def theirs(num_tokens: int, moment: str) -> Callable[[], Contender]:
        def make() -> Contender:
            layer = peers.peer_pytorch(layer_of(n * n))
            run = Training(layer, twin_input(num_tokens, D), peers.adam(layer, 1e-3)).step
            if moment != "full":
                return Contender(run)
            return Contender(run, small_peer(False).probe, small_peer(True).moved)

        return make

    what = f"times as fast as {PEER} and torch's fused AdamW"
    # In a case of its own, for three contenders of a million experts would not fit on a machine of 24 GiB.
    steps: tuple[tuple[int, Moment, int], ...] = ((512, "full", 16), (4096, "full", 19), (512, "row", 14))
    for num_tokens, moment, gib in steps:
        name = f"{num_tokens} tokens" if moment == "full" else f"{num_tokens} tokens, row-wise second moment"
        yield Case(
            name,
            {OURS: ours(num_tokens, moment), PEER: theirs(num_tokens, moment)},
            [Number(f"peer_step/{name}", what, (PEER,), same=moment == "full")],
            {"num_experts": n * n, "d_model": D, "num_heads": HEADS, "top_k": K, "num_tokens": num_tokens},
            budget_s=24 if num_tokens == 4096 else 12,
            gib=2 if quick else gib,
        )


def forward_cases(quick: bool) -> Iterator[Case]:
    """Forward alone, 512 tokens; both contenders read the same tables."""
    n, num_tokens = side(quick), 512
    layer = layer_of(n * n)
    x = twin_input(num_tokens, D).detach()
    ids = picked_ids(layer, x)
    tables = layer.get_parameter("w_in").detach(), layer.get_parameter("w_out").detach()

    def ours() -> Contender:
        return Contender(Training(layer, x).forward, small_ours(False).probe)

    def theirs() -> Contender:
        run = Training(peers.peer_pytorch(layer, share_tables=True), x).forward
        return Contender(run, small_peer(False).probe)

    def reads() -> Contender:
        return Contender(lambda: [read_rows(table, ids) for table in tables])

    @torch.no_grad()
    def find() -> None:
        found(layer, x)

    picks, gates = ids.view(num_tokens, -1), torch.full((num_tokens, HEADS * K), 1 / K)

    @torch.no_grad()
    def use() -> Tensor:
        return peer_experts(x[0], picks, gates, *tables)

    parts = {"finding the rows": find, "using the rows": use}
    reading = {"reading the same rows": reads}
    rows, queries = 4.0 * D * 2 * ids.numel(), 2.0 * num_tokens * HEADS * D_KEY * (D + n)
    yield Case(
        "512 tokens",
        {OURS: ours, PEER: theirs} | reading | {n: lambda p=p: Contender(p) for n, p in parts.items()},
        [
            Number("peer_forward/512 tokens", f"times as fast as {PEER}", (PEER,)),
            # Queries and scores are matrix products, which no read bounds: the share is that of the looked-up rows.
            Number(
                "peer_forward/share of random reads",
                "of the read-only rate of the same rows, in the part that uses rows",
                tuple(reading),
                "using the rows",
                same=False,
            ),
            Number(
                "peer_forward/share of random reads, whole forward",
                "of the read-only rate of the same rows, with queries, scores and top-k",
                tuple(reading),
                same=False,
            ),
            Number("peer_forward/share of finding", "of the forward finds the rows", ("finding the rows",), same=False),
        ],
        {"num_experts": n * n, "num_tokens": num_tokens, "distinct_rows": len(ids.unique())},
        {"random_rows": rows, "gemm_fp32": queries},
        gib=1 if quick else 6,
    )


@torch.no_grad()
def picked_ids(layer: Layer, x: Tensor) -> Tensor:
    """The rows that the layer looks up for x, token by token."""
    return found(layer, x).ids.flatten()


def found(layer: Layer, x: Tensor) -> Found:
    assert isinstance(layer, PEERLayer)
    return look_up(layer.config, layer.query, layer.query_norm, layer.sub_keys, x[0], None, False)


@dataclass(frozen=True)
class MemoryCase:
    """Peak memory of training steps beyond what was there before the layer was built, and beyond its two tables."""

    name: str
    num_experts: int
    num_tokens: int
    suffix: str = ""

    def measure(self, quick: bool) -> dict[str, Any]:
        peak: dict[str, float] = {}
        said: dict[str, str] = {}
        threads = torch.get_num_threads()
        # Two tables, their gradients and two moments each, and once more what lies between.
        needs = 10 * self.num_experts * D * 4 / 2**30
        for who in ("full", "row", PEER):
            if free_gib() < needs:
                said[who] = f"{ABSENT}: needs {needs:.0f} GiB of free memory, here are {free_gib():.0f}"
                continue
            # A process of its own: what one contender leaves behind must not count for the next.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                try:
                    peak[who] = pool.apply(peak_bytes, (who, self.num_experts, self.num_tokens, threads))
                    said[who] = "ok"
                except Unavailable as error:
                    said[who] = f"{ABSENT}: {error}"
        numbers = []
        for who, what in (("full", "full moments"), ("row", "row-wise second moment")):
            value = peak[who] / peak[PEER] if who in peak and PEER in peak else None
            about = f"of the memory that {PEER} and torch's fused AdamW take beyond the tables"
            missing = "; ".join(f"{n}: {said[n]}" for n in (who, PEER) if n not in peak) or None
            numbers.append(number_row(f"peer_memory/{what}{self.suffix}", about, value, missing))
        rows = {who: {"said": said[who]} | ({"peak_bytes": peak[who]} if who in peak else {}) for who in said}
        settings = {"num_experts": self.num_experts, "num_tokens": self.num_tokens}
        return {"name": self.name, "settings": settings, "amounts": {}, "contenders": rows, "numbers": numbers}


def peak_bytes(who: str, num_experts: int, num_tokens: int, threads: int) -> float:
    """Peak memory of three steps beyond the two tables; `who` is one of our second moments, or the peer."""
    torch.set_num_threads(threads)
    x = twin_input(num_tokens, D)
    # Libraries and kernels are loaded before anything is counted.
    small = (small_peer if who == PEER else small_ours)(True)
    small.step()
    before = resident()
    if who == PEER:
        layer = peers.peer_pytorch(layer_of(num_experts))
        training = Training(layer, x, peers.adam(layer, 1e-3))
    else:
        layer = layer_of(num_experts)
        training = Training(layer, x, our_optimizer(layer, table_moment="row" if who == "row" else "full"))
    peak = PeakMemory()
    for _ in range(3):
        training.step()
    return peak.bytes() - before - 2 * num_experts * D * 4


def resident() -> int:
    """Memory of this process now: a high-water mark that has just begun."""
    return PeakMemory().bytes()


def memory_cases(quick: bool) -> Iterator[MemoryCase]:
    n = side(quick)
    yield MemoryCase(f"{n}^2 experts, 512 tokens", n * n, 512)
    yield MemoryCase(f"{n}^2 experts, 4096 tokens", n * n, 4096, ", 4096 tokens")


WORKS = (
    Work(
        "peer_step",
        "PEER training step: forward, backward, optimizer",
        step_cases,
        ("peer_step/512 tokens", "peer_step/4096 tokens"),
    ),
    Work(
        "peer_forward",
        "PEER forward",
        forward_cases,
        ("peer_forward/512 tokens", "peer_forward/share of random reads"),
    ),
    Work(
        "peer_memory",
        "peak memory of a PEER training step",
        memory_cases,
        ("peer_memory/full moments", "peer_memory/row-wise second moment"),
    ),
)
