"""A dense transformer in plain PyTorch, written without this library, and our dense training step timed against it.

`python -m bench.plain [THREADS] [long] [documents]`: both compiled, one process, steps interleaved; no ratio if they
differ. The ratio is the median over rounds, beside that of plain with itself: the least of few steps is luck."""

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemix import build_model
from sparsemix.layers import Ctx
from sparsemix.optim import build_optimizer
from sparsemix.step import block_runner


class PlainBlock(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mixer_norm, self.ffn_norm = nn.RMSNorm(d_model, eps=1e-6), nn.RMSNorm(d_model, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(d_model, d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        B, T, D = x.shape
        h = self.mixer_norm(x)
        q, k, v = (project(h).view(B, T, self.num_heads, -1).transpose(1, 2) for project in (self.q, self.k, self.v))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Plain(nn.Module):
    """Mean nats of next tokens; `doc_ids` masks attention to the same document, once for all blocks."""

    cos: Tensor
    sin: Tensor

    def __init__(self, d_model: int, vocab_size: int, seq_len: int, num_blocks: int, num_heads: int, d_ff: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(PlainBlock(d_model, num_heads, d_ff) for _ in range(num_blocks))
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        d_head = d_model // num_heads
        angle = torch.arange(seq_len)[:, None] * 10_000.0 ** -(torch.arange(0, d_head, 2) / d_head)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        x, T, mask = self.embed(tokens), tokens.shape[1], None
        if doc_ids is not None:
            mask = (doc_ids[:, None, :, None] == doc_ids[:, None, None, :]).tril()
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T], mask)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each channel pair (i, i + d_head/2) turned by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def plain_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a dense model of this library, under the names of `Plain`."""
    return {name.replace(".mixer.", ".").replace(".ffn.", "."): value for name, value in state.items()}


class Shape(NamedTuple):
    """Sizes of the model and of a batch."""

    num_blocks: int
    T: int
    B: int
    V: int


D, HEADS, D_FF = 256, 4, 688
SHORT, LONG = Shape(4, 256, 8, 4096), Shape(6, 512, 4, 1024)
ROUNDS = 12


def dense_steps(shape: Shape, documents: bool) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Name -> one training step (both compiled, both with fused AdamW) that returns its loss and gradients."""
    block = {
        "kind": "block",
        "mixer": {"kind": "attention", "num_heads": HEADS},
        "ffn": {"kind": "dense", "d_ff": D_FF},
    }
    num_blocks, T, B, V = shape
    pattern = {"count": num_blocks, "each": block}
    ours = build_model({"d_model": D, "vocab_size": V, "seq_len": T, "blocks": pattern}).train()
    plain = Plain(D, V, T, num_blocks, HEADS, D_FF)
    plain.load_state_dict(plain_weights(ours.state_dict()), strict=False)
    tokens = torch.randint(V, (B, T + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    doc_ids = (torch.arange(B * T) // 100).view(B, T) if documents else None
    run, compiled = block_runner(ours, True, False), torch.compile(plain)

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], dict[str, Tensor]]:
        optimizer = build_optimizer(model, 1e-3)

        def one() -> dict[str, Tensor]:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            return plain_weights({"loss": value.detach(), **grads})

        return one

    return {
        "ours": step(ours, lambda: ours.loss(inputs, targets, Ctx(doc_ids=doc_ids), run).mean),
        "plain": step(plain, lambda: compiled(inputs, targets, doc_ids)),
    }


def main() -> None:
    words = sys.argv[1:]
    torch.set_num_threads(int(words[0]) if words and words[0].isdecimal() else 2)
    steps = dense_steps(LONG if "long" in words else SHORT, "documents" in words)
    first = {name: step() for name, step in steps.items()}
    for name, value in first["plain"].items():
        torch.testing.assert_close(first["ours"][name], value, rtol=1e-3, atol=1e-5)
    steps["plain again"] = steps["plain"]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(ROUNDS):
        for name in list(steps)[:: -1 if i % 2 else 1]:
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        print(f"{name}: {min(taken):.3f} s at least, median {median(taken):.3f} s")
    for name in ("ours", "plain again"):
        ratios = sorted(p / s for p, s in zip(seconds["plain"], seconds[name], strict=True))
        middle = f"{ratios[ROUNDS // 4]:.2f} to {ratios[-1 - ROUNDS // 4]:.2f}"
        print(f"{name}: {median(ratios):.3f} times as fast as plain (the middle half of {ROUNDS} rounds: {middle})")


if __name__ == "__main__":
    main()
