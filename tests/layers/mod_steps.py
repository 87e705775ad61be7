"""Training steps of Mixture-of-Depths layers, plain or through any `run`."""

import torch
from cases import tokens

from sparsemix.layers import Ctx, update

BLOCK = {"kind": "block", "mixer": {"kind": "attention", "num_heads": 5}, "ffn": {"kind": "dense", "d_ff": 3}}
MOE = {"kind": "moe", "num_experts": 5, "top_k": 2, "d_ff": 3}
BASE = {"kind": "mod", "capacity": 0.4, "predictor_width": 3, "inner": BLOCK}
CASES = {
    "predictor": BASE,
    "router_bce": BASE | {"sampling": "router_bce"},
    "threshold": BASE | {"sampling": "threshold"},
    "token_choice": BASE | {"selector": "token_choice"},
    "strided": BASE | {"selector": "strided"},
    "random": BASE | {"selector": "random"},
    "moe": BASE | {"inner": BLOCK | {"ffn": MOE}},
    "mod": BASE | {"inner": BASE},
}


def step(layer, x, ctx):
    y, aux = layer(x, ctx)
    return y, (y.square().sum() + sum(aux.losses.values())), aux.stats


def train_steps(layer, run, steps=4):
    """Outputs and gradients over optimizer steps with ever new tokens, padding and documents."""
    seen = []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for i in range(steps):
        torch.manual_seed(i)
        x = tokens().requires_grad_()
        valid = torch.rand(2, 7) > 0.2
        ctx = Ctx(valid=valid, doc_ids=(torch.arange(7) >= i).long().expand(2, 7))
        torch.manual_seed(100 + i)
        y, loss, stats = run(layer, x, ctx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update(layer, stats)
        seen += [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
    return seen
