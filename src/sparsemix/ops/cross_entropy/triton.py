"""Two passes over a row of logits: log-sum-exp as it goes, then the gradient in place."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 4096


@triton.jit
def _nats(logits, targets, share, out, V: tl.constexpr, LEARNS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * V
    target = tl.load(targets + n)
    known = target >= 0
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    x_target = tl.load(row + tl.where(known, target, 0)).to(tl.float32)
    tl.store(out + n, tl.where(known, tl.log(total) - (x_target - top), 0.0))
    if LEARNS:
        slope = tl.where(known, tl.load(share), 0.0)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - top) / total
            gradient = slope * (p - tl.where(at == target, 1.0, 0.0))
            tl.store(row + at, gradient.to(logits.dtype.element_ty), mask=at < V)


def nats(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], share: Float[Tensor, ""] | None
) -> Float[Tensor, " N"]:
    """As reference.nats; the logits must be contiguous."""
    N, V = logits.shape
    out = logits.new_empty(N, dtype=torch.float32)
    if N:
        block = min(BLOCK, triton.next_power_of_2(V))
        learns, factor = share is not None, out if share is None else share
        _nats[(N,)](logits, targets, factor, out, V, learns, block, num_warps=8)  # pyright: ignore[reportCallIssue]
    return out
