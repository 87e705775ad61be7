"""Layers that look up table rows, and their training beside torch's AdamW on dense gradients."""

import pytest
import torch

from sparsemix.api import build_layer, build_optimizer
from sparsemix.layers import update
from sparsemix.ops.row_grad.factored import FactoredGrad
from sparsemix.optim import schedule

D = 10
PEER = {"kind": "peer", "num_experts": 64, "num_heads": 2, "top_k": 4, "d_key": 6}
PKM = {"kind": "pkm", "num_values": 81, "num_heads": 2, "top_k": 4, "d_key": 6}
LAYERS = {"peer": PEER, "pkm": PKM}
TABLES = ("w_in", "w_out", "value_vectors")
each_layer = pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
each_moment = pytest.mark.parametrize("moment", ["full", "row"])


def layer_of(config, seed=0):
    torch.manual_seed(seed)
    return build_layer(config, D).train()


def inputs(steps, T=17):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, T, D, generator=generator) for _ in range(steps)]


def backward(layer, x, scale=1.0):
    y, aux = layer(x)
    (scale * y.square().mean()).backward()
    return aux


def tables_of(layer):
    return {name: p for name, p in layer.named_parameters() if name in TABLES}


def torchs_adamw(layer, lr, table_decay=0.0):
    """Dense AdamW with the decay that ours gives each parameter."""
    optimizer = build_optimizer(layer, lr, table_decay=table_decay)
    optimizer.release()
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def trained(layer, optimizer, batches, lr=0.02, clip=None):
    for step, x in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, len(batches), 3)
        optimizer.zero_grad()
        aux = backward(layer, x, 20.0)
        if clip is not None:
            clip(layer.parameters())
        optimizer.step()
        update(layer, aux.stats)
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


# A norm over queries would leave the bias of the query no gradient but noise, which AdamW scales up to its rate.
STILL = {"query_norm": "none"}


def take_rows(table):
    """What was recorded for a lent table since the last call, one entry a look-up, in the order of the backward
    passes."""
    grad, table.grad = table.grad, None
    assert grad is None or isinstance(grad, FactoredGrad)
    return [] if grad is None else grad.parts
