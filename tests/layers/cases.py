"""Is a layer its per-token loop, in output, losses and every gradient?"""

import torch
from loops import loop

from sparsemix.config import parse
from sparsemix.layers import Ctx, LayerConfig

D = 10


def build(config, d_model=D, seed=0, train=True):
    """An fp64 layer with every parameter away from its special values (zero biases, norms of one)."""
    torch.manual_seed(seed)
    layer = parse(LayerConfig, config).build(d_model).double().train(train)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def tokens(B=2, T=7, d_model=D):
    return torch.randn(B, T, d_model, dtype=torch.float64)


def contexts(B=2, T=7):
    """Every combination a layer may meet: plain, padded on both sides, packed, moved, all of them."""
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, T - 3 :] = False
    valid[-1, :2] = False
    doc_ids = torch.stack([(torch.arange(T) >= cut).long() + (torch.arange(T) >= T - 1) for cut in range(2, 2 + B)])
    positions = torch.stack([torch.arange(T) * (b + 2) + (torch.arange(T) > 2) * 5 for b in range(B)])
    return {
        "plain": Ctx(),
        "padded": Ctx(valid=valid),
        "packed": Ctx(doc_ids=doc_ids),
        "moved": Ctx(positions=positions),
        "all": Ctx(positions, doc_ids, valid),
    }


def assert_is_its_loop(layer, x, ctx):
    """Outputs of real tokens, losses by name, and the gradients of both towards x and every parameter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y, aux = layer(x, ctx)
    torch.manual_seed(7)
    wanted, losses = loop(layer, x, ctx)
    real = torch.ones(x.shape[:2], dtype=torch.bool) if ctx.valid is None else ctx.valid
    torch.testing.assert_close(y[real], wanted[real], rtol=0, atol=1e-11)
    assert set(aux.losses) == set(losses)
    for name, value in losses.items():
        torch.testing.assert_close(aux.losses[name], value, rtol=0, atol=1e-11)
    weights = torch.randn_like(y) * real[..., None]
    moving = {"x": x, **dict(layer.named_parameters())}
    grads, wanted_grads = (
        gradients((out * weights).sum() + sum(said.values()), list(moving.values()))
        for out, said in ((y, aux.losses), (wanted, losses))
    )
    for name, got, want in zip(moving, grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    return {name: float(want.abs().max()) for name, want in zip(moving, wanted_grads, strict=True)}


def gradients(total, moving):
    """Zero where nothing leads; a total that is a constant (no token was routed) leads nowhere."""
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in moving]
    return torch.autograd.grad(total, moving, materialize_grads=True)


ATTENTION = {"kind": "attention", "num_heads": 5}
DENSE = {"kind": "dense", "d_ff": 7}
MOE = {"kind": "moe", "num_experts": 5, "top_k": 2, "d_ff": 3}
EXPERT_CHOICE = {"kind": "expert_choice", "num_experts": 5, "capacity_factor": 2.0, "d_ff": 3}
# Three of four columns are real, so that balanced costs are whole numbers.
MODE = {"kind": "mode", "num_experts": 6, "num_noop": 2, "top_k": 2, "d_ff": 3}
PEER = {"kind": "peer", "num_experts": 9, "num_heads": 2, "top_k": 3, "d_key": 4}
PKM = {"kind": "pkm", "num_values": 9, "num_heads": 2, "top_k": 3, "d_key": 4}
# One small layer of every registered kind; a new kind adds its own.
BASES = {
    "attention": ATTENTION,
    "dense": DENSE,
    "moe": MOE | {"shared_d_ff": 4, "z_weight": 0.1},
    "pkm": PKM,
    "expert_choice": EXPERT_CHOICE | {"shared_d_ff": 4},
    "mode": MODE | {"z_weight": 0.1},
    "peer": PEER,
    "mh_moe": {"kind": "mh_moe", "num_heads": 5, "inner": MOE, "bias": True},
    "mod": {
        "kind": "mod",
        "capacity": 0.5,
        "predictor_width": 3,
        "inner": {"kind": "block", "mixer": ATTENTION, "ffn": DENSE},
    },
    "block": {"kind": "block", "mixer": ATTENTION, "ffn": PEER},
    "beside": {"kind": "beside", "kept": DENSE, "added": PEER},
}
