"""torch.export: one program of every kind for any batch and length, which gives what the layer gives."""

import pytest
import torch
from cases import ATTENTION, DENSE, EXPERT_CHOICE, MODE, MOE, PEER, PKM, build, tokens
from torch.export import Dim, export

from sparsemix.config import parse
from sparsemix.layers import Ctx, LayerConfig, update
from tiny import unchecked_shapes

LLAMA3 = {"kind": "llama3", "factor": 2.0, "original_seq_len": 8}
TERNARY_MOE = MOE | {"capacity_factor": 0.6, "bias_rate": 0.1, "shared_d_ff": 4, "precision": "ternary"}


def mod(inner, **settings):
    return {"kind": "mod", "capacity": 0.5, "predictor_width": 3, "inner": inner} | settings


def block(ffn, **attention):
    return {"kind": "block", "mixer": ATTENTION | attention, "ffn": ffn}


# Every kind, and every way that a causal layer may read a length or a number of picks.
CASES = {
    "peer": block({"kind": "beside", "kept": MOE, "added": PEER}),
    "pkm": block(PKM | {"query_norm": "layer", "share_keys": True}, num_kv_heads=1, window=3, rope_scaling=LLAMA3),
    "mh_moe": {"kind": "mh_moe", "num_heads": 5, "inner": TERNARY_MOE, "precision": "ternary"},
    "mode": {"kind": "beside", "kept": MODE, "added": MODE | {"routing": "expert_choice"}},
    "mod": mod(block(EXPERT_CHOICE)),
    "mod_of_mods": mod(mod(mod(DENSE, selector="strided"), selector="random"), sampling="threshold", anneal_steps=9),
}
PADDED = ("pkm", "mod")
SHAPES = ((1, 1), (2, 5), (4, 16), (3, 1))


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    # A length that is a symbol is no int to the checks.
    with unchecked_shapes():
        yield


class Update(torch.nn.Module):
    """A layer whose output is the update alone, by the causal rule."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, valid=None):
        return self.layer(x, Ctx(valid=valid, causal=True))[0]


def exported(layer, *inputs):
    sizes = {0: Dim("B"), 1: Dim("T")}
    return export(Update(layer.eval()), inputs, dynamic_shapes=(sizes,) * len(inputs)).module()


def padding(B, T):
    """At least one real token in every row, padding on both sides."""
    return (torch.arange(T) >= torch.arange(B)[:, None].clamp(max=T // 2)) & (torch.arange(T) < max(1, T - 1))


def kinds_of(config):
    return {config.kind}.union(*(kinds_of(child) for child in config.children()))


def test_every_kind_is_exported_below():
    assert set(LayerConfig.family) == set().union(*(kinds_of(parse(LayerConfig, config)) for config in CASES.values()))


@pytest.mark.parametrize("name", CASES)
def test_an_exported_layer_answers_as_the_layer_for_any_batch_and_length(name):
    layer, padded = build(CASES[name]).requires_grad_(False), name in PADDED
    update(layer, layer(tokens(B=3, T=9))[1].stats)
    program = exported(layer, tokens(3, 9), *([padding(3, 9)] * padded))
    for B, T in SHAPES:
        inputs = tokens(B, T), *([padding(B, T)] * padded)
        torch.testing.assert_close(program(*inputs), Update(layer)(*inputs), rtol=0, atol=1e-11)
