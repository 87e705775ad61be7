"""Mixtures of experts beside transformers' three implementations, a dense chain, and two capacity peers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsemix.bench import peers
from sparsemix.bench.agreement import with_gradients
from sparsemix.bench.training import Training, twin_input
from sparsemix.bench.work import OURS, Case, Contender, Number, Work
from sparsemix.layers.dispatch import dispatch
from sparsemix.layers.linear import Experts

D, T = 256, 2048
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def routed(num_experts: int, top_k: int, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, gates and picks of a router that has not been trained."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_tokens, D, generator=generator).to(dtype)
    probs = torch.randn(num_tokens, num_experts, generator=generator).softmax(-1)
    gates, ids = probs.topk(top_k, dim=-1)
    return tokens, (gates / gates.sum(-1, keepdim=True)).to(dtype), ids


def bank_of(num_experts: int, d_ff: int, dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    return Experts(num_experts, D, d_ff, "swiglu").to(dtype)


def leaves_of(bank: Experts, tokens: Tensor, gates: Tensor) -> dict[str, Tensor]:
    inputs = {"tokens": tokens.clone().requires_grad_(), "gates": gates.clone().requires_grad_()}
    return inputs | {"gate_up": bank.gate_up, "down": bank.down}


def expert_cases(quick: bool) -> Iterator[Case]:
    """Forward and backward of the expert part, k = 8, d_ff = 128."""
    top_k, d_ff = 8, 128
    sizes = [(64, torch.float32), (256, torch.float32), (1024, torch.float32), (64, torch.bfloat16)]
    for num_experts, dtype in sizes[:1] if quick else sizes:
        name = f"E={num_experts}" + (" bf16" if dtype == torch.bfloat16 else "")
        rows = T * top_k
        # batched_mm copies the weights of every pick, and their gradients.
        copies = rows * 3 * D * d_ff * dtype.itemsize * 2.5 / 2**30
        # eager makes a dense gradient of the whole bank for every expert: minutes a call at 1024.
        others = IMPLEMENTATIONS[:2] if num_experts < 1024 else IMPLEMENTATIONS[1:2]
        yield expert_case(name, num_experts, top_k, d_ff, dtype, others, 18.0 * rows * D * d_ff)
        if num_experts == 64 and dtype == torch.float32 and not quick:
            few = expert_case("E=64, 256 tokens", 64, top_k, d_ff, dtype, IMPLEMENTATIONS, 0.0, 256, copies / 8)
            yield few


def expert_case(
    name: str,
    num_experts: int,
    top_k: int,
    d_ff: int,
    dtype: torch.dtype,
    implementations: tuple[str, ...],
    flops: float,
    num_tokens: int = T,
    gib: float = 0.0,
) -> Case:
    """One size of the expert part against transformers' implementations of it."""
    tokens, gates, ids = routed(num_experts, top_k, num_tokens, dtype)
    bank = bank_of(num_experts, d_ff, dtype)
    leaves = leaves_of(bank, tokens, gates)

    def contender(part: Callable[[Tensor, Tensor], Tensor]) -> Contender:
        def run() -> dict[str, Tensor]:
            return with_gradients(lambda tokens, gates, *_: part(tokens, gates), leaves)

        return Contender(run, run)

    def ours() -> Contender:
        return contender(lambda tokens, gates: dispatch(tokens, ids, gates, bank, num_experts))

    def theirs(implementation: str) -> Callable[[], Contender]:
        def make() -> Contender:
            experts = peers.transformers_experts(bank, implementation)
            return contender(lambda tokens, gates: experts(tokens, ids, gates))

        return make

    others = {f"transformers {which}": theirs(which) for which in implementations}
    ceiling = "gemm_bf16" if dtype == torch.bfloat16 else "gemm_fp32"
    return Case(
        name,
        {OURS: ours, **others},
        [Number(f"moe_experts/{name}", "times as fast as {best}, the best of them", tuple(others))],
        {"num_experts": num_experts, "top_k": top_k, "d_model": D, "d_ff": d_ff, "num_tokens": num_tokens},
        {ceiling: flops} if flops else {},
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
        gib=gib,
    )


def dense_cases(quick: bool) -> Iterator[Case]:
    """The expert part beside one dense feed-forward of equal FLOPs, forward and backward."""
    # bf16 first: the floor is on it.
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for num_experts, top_k, d_ff in ((8, 2, 512), (64, 8, 128)):
            yield dense_case(f"E={num_experts} {word}", num_experts, top_k, d_ff, dtype, 512 if quick else T)


def dense_case(name: str, num_experts: int, top_k: int, d_ff: int, dtype: torch.dtype, num_tokens: int) -> Case:
    tokens, gates, ids = routed(num_experts, top_k, num_tokens, dtype)
    bank = bank_of(num_experts, d_ff, dtype)
    leaves = leaves_of(bank, tokens, gates)
    wide = bank_of(1, top_k * d_ff, dtype)
    dense = {"tokens": leaves["tokens"], "gate_up": wide.gate_up, "down": wide.down}

    def chain(tokens: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(tokens, gate_up[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down[0])

    def experts(tokens: Tensor, gates: Tensor, *_: Tensor) -> Tensor:
        return dispatch(tokens, ids, gates, bank, num_experts)

    other = "dense chain"
    return Case(
        name,
        {
            OURS: lambda: Contender(lambda: with_gradients(experts, leaves)),
            other: lambda: Contender(lambda: with_gradients(chain, dense)),
        },
        [Number(f"moe_dense/{name}", "of the rate of a dense chain of equal FLOPs", (other,), same=False)],
        {"num_experts": num_experts, "top_k": top_k, "d_ff": d_ff, "num_tokens": num_tokens},
        budget_s=4,
        tolerance=2e-2,
    )


def capacity_cases(quick: bool) -> Iterator[Case]:
    """Whole layers at a capacity of 1.25 seats a token: router, experts, forward and backward."""
    num_experts, d_ff, factor, num_tokens = 16, 4 * D, 1.25, 256 if quick else 1024

    def case(name: str, activation: str, width: int, peer: Any, names: Any) -> Case:
        torch.manual_seed(0)
        layer = peers.our_moe(num_experts, D, width, factor, activation).train()
        x = twin_input(num_tokens, D)

        def ours() -> Contender:
            training = Training(layer, x)
            return Contender(training.backward, training.probe)

        def theirs() -> Contender:
            training = Training(peer(layer, factor).train(), twin_input(num_tokens, D), named=names)
            return Contender(training.backward, training.probe)

        settings = {"num_experts": num_experts, "d_ff": width, "capacity": factor, "num_tokens": num_tokens}
        number = Number(f"moe_capacity/{name}", f"times as fast as {name}", (name,))
        return Case(name, {OURS: ours, name: theirs}, [number], settings, budget_s=4)

    yield case("mixture-of-experts", "gelu", d_ff, peers.mixture_of_experts, peers.mixture_names)
    yield case("st-moe-pytorch", "geglu", d_ff * 2 // 3, peers.st_moe, peers.st_moe_names)


WORKS = (
    Work(
        "moe_experts",
        "expert part of a fine-grained MoE, forward and backward",
        expert_cases,
        tuple(f"moe_experts/E={E}" for E in (64, 256, 1024)),
    ),
    Work(
        "moe_dense",
        "expert part beside a dense chain",
        dense_cases,
        tuple(f"moe_dense/E={E} {dtype}" for E in (8, 64) for dtype in ("bf16", "fp32")),
    ),
    Work("moe_capacity", "MoE layers at a capacity, forward and backward", capacity_cases),
)
