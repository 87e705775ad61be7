"""What every loop is made of: the real tokens of a batch, and one feed-forward on one token."""

import math

import torch

ACTIVATION = {
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
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


def rms(token, weight, eps=1e-6):
    return token / (token.square().mean() + eps).sqrt() * weight


def norm_of(norm, token):
    if norm.__class__.__name__ == "LayerNorm":
        apart = token - token.mean()
        return apart / (apart.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias
    return rms(token, norm.weight, norm.eps)


def share_of(module):
    return 1.0 if module.warmup is None else float(module.warmup.share())


def ternary_row(token, share):
    """x + share (Q(x) - x), gradient one; Q rounds to 127 steps of the row's largest magnitude."""
    s = 127 / max(float(token.detach().abs().max()), 1e-5)
    return token + share * ((token * s).round() / s - token).detach()


def ternary_matrix(weight, share):
    """W + share (Q(W) - W), gradient one; Q rounds to -1, 0, 1 times the mean magnitude."""
    scale = max(float(weight.detach().abs().mean()), 1e-5)
    return weight + share * ((weight / scale).round().clamp(-1, 1) * scale - weight).detach()


def times(module, weight, token):
    """weight token in the precision of `module`."""
    if not module.precision.ternary:
        return weight @ token
    return ternary_matrix(weight, share_of(module)) @ ternary_row(token, share_of(module))


def linear(module, token):
    out = times(module, module.weight, token)
    return out if module.bias is None else out + module.bias


def normed(norm, token):
    """RMSNorm where there is one: `norm` is its gain, or None."""
    return token if norm is None else rms(token, norm)


def gain(norm):
    return None if norm is None else norm.weight


def activated(activation, up, gate):
    return ACTIVATION[GATED[activation]](gate) * up if activation in GATED else ACTIVATION[activation](up)


def dense(layer, x, ctx):
    fed = {}
    for at in real_tokens(x, ctx):
        gate = linear(layer.gate, x[at]) if layer.activation in GATED else None
        hidden = activated(layer.activation, linear(layer.up, x[at]), gate)
        fed[at] = linear(layer.down, normed(gain(layer.sub_norm), hidden))
    return assemble(x, fed), {}


def expert(bank, e, token):
    if bank.activation in GATED:
        gate, up = (times(bank, weight, token) for weight in bank.gate_up[e].chunk(2))
    else:
        gate, up = None, times(bank, bank.up[e], token)
    hidden = activated(bank.activation, up, gate)
    return times(bank, bank.down[e], normed(None if bank.sub_norm is None else bank.sub_norm[e], hidden))
