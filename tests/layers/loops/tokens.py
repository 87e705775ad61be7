"""What every loop is made of: the real tokens of a batch, and one feed-forward on one token."""

import math

import torch

ACTIVATION = {
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z / (1 + torch.exp(-z)),
}
GATED = {"swiglu": "silu", "geglu": "gelu"}


def real_of(x, ctx):
    return torch.ones(x.shape[:2], dtype=torch.bool) if ctx.valid is None else ctx.valid


def real_tokens(x, ctx):
    real = real_of(x, ctx)
    return [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1]) if real[b, t]]


def assemble(x, rows):
    """(B, T, D) from {(b, t): vector}; zero where there is none."""
    zero = torch.zeros_like(x[0, 0])
    return torch.stack([torch.stack([rows.get((b, t), zero) for t in range(x.shape[1])]) for b in range(x.shape[0])])


def feed(token, up, down, gate, activation):
    if activation in GATED:
        return down @ (ACTIVATION[GATED[activation]](gate @ token) * (up @ token))
    return down @ ACTIVATION[activation](up @ token)


def dense(layer, x, ctx):
    gate = layer.gate.weight if layer.activation in GATED else None
    fed = {
        (b, t): feed(x[b, t], layer.up.weight, layer.down.weight, gate, layer.activation)
        for b, t in real_tokens(x, ctx)
    }
    return assemble(x, fed), {}


def expert(bank, e, token):
    if bank.activation in GATED:
        F_ = bank.gate_up.shape[1] // 2
        return feed(token, bank.gate_up[e, F_:], bank.down[e], bank.gate_up[e, :F_], bank.activation)
    return feed(token, bank.up[e], bank.down[e], None, bank.activation)
