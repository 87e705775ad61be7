import pytest
import torch
from cases import BASES, DENSE, MODE, MOE, build, tokens

from sparsemix.api import layer_cost
from sparsemix.layers import Ctx, LayerConfig, update

# Heads of width 4: at width 2 rotary positions have one frequency, and rope_theta no say.
D = 20
BASE = BASES | {"moe": MOE, "mode": MODE, "mh_moe": BASES["mh_moe"] | {"bias": False}}
# Another value of every setting of every kind. A new kind or setting adds its own, or the test below fails.
OTHER = {
    "attention": {
        "num_heads": 1,
        "num_kv_heads": 1,
        "d_head": 6,
        "bias": "all",
        "qk_norm": "head",
        "window": 3,
        "rope_theta": 100.0,
        "rope_scaling": {"kind": "linear", "factor": 3.0},
        "precision": "ternary",
    },
    "dense": {"d_ff": 6, "activation": "geglu", "bias": True, "precision": "ternary"},
    "moe": {
        "num_experts": 6,
        "top_k": 1,
        "d_ff": 4,
        "shared_d_ff": 5,
        "normalize_gates": True,
        "balance_weight": 0.5,
        "balance_picks": "first",
        "z_weight": 0.1,
        "bias_rate": 0.5,
        "capacity_factor": 0.5,
        "activation": "geglu",
        "precision": "ternary",
    },
    "expert_choice": {
        "num_experts": 6,
        "capacity_factor": 1.0,
        "d_ff": 4,
        "group": "batch",
        "shared_d_ff": 5,
        "activation": "geglu",
        "precision": "ternary",
    },
    "mode": {
        "num_experts": 5,
        "num_noop": 3,
        "top_k": 1,
        "d_ff": 4,
        "routing": "expert_choice",
        "normalize_gates": True,
        "balance_weight": 0.5,
        "z_weight": 0.1,
        "activation": "geglu",
        "precision": "ternary",
    },
    "pkm": {
        "num_values": 16,
        "num_heads": 3,
        "top_k": 2,
        "d_key": 6,
        "query_norm": "layer",
        "init_scale": 0.5,
        "share_keys": True,
    },
    "peer": {
        "num_experts": 16,
        "num_heads": 3,
        "top_k": 2,
        "d_key": 6,
        "gate": "sigmoid",
        "activation": "silu",
        "query_norm": "layer",
        "init_scale": 0.5,
        "share_keys": False,
    },
    "mh_moe": {
        "num_heads": 2,
        "inner": DENSE,
        "shared_d_ff": 3,
        "bias": True,
        "inner_residual": True,
        "head": False,
        "merge": False,
        "precision": "ternary",
    },
    "mod": {
        "inner": DENSE,
        "capacity": 0.25,
        "gate": "two_sigmoid",
        "block_output": "full",
        "selector": "strided",
        "sampling": "threshold",
        "predictor_width": 4,
        "router_loss_weight": 0.7,
        "anneal_steps": 9,
    },
    "block": {"mixer": DENSE, "ffn": DENSE, "norm": "layer"},
    "beside": {"kept": MOE, "added": MOE},
}
# What else must be set for a setting to have its say.
BESIDE = {("mod", "router_loss_weight"): {"sampling": "router_bce"}}


def observe(config):
    """What settings can change: output (after running state moved once), losses, cost."""
    layer = build(config, D)
    torch.manual_seed(1)
    x = tokens(d_model=D)
    update(layer, layer(x, Ctx())[1].stats)
    y, aux = layer(x, Ctx())
    return y.detach(), {name: float(value.detach()) for name, value in aux.losses.items()}, layer_cost(config, D, 7)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [(kind, name) for kind, config in LayerConfig.family.items() for name in config.model_fields if name != "kind"],
)
def test_every_setting_changes_output_losses_or_cost(kind, setting):
    assert kind in BASE, f"add a small layer of kind {kind} to BASES in cases.py"
    assert setting in OTHER.get(kind, {}), f"add another value of {kind}.{setting} to OTHER"
    base = BASE[kind] | BESIDE.get((kind, setting), {})
    before = observe(base)
    again = observe(base)
    assert torch.equal(before[0], again[0]) and before[1:] == again[1:], "the comparison itself must be exact"
    after = observe(base | {setting: OTHER[kind][setting]})
    assert not torch.equal(before[0], after[0]) or before[1:] != after[1:]


def test_no_value_is_listed_for_a_setting_that_does_not_exist():
    for kind, others in OTHER.items():
        assert set(others) == set(LayerConfig.family[kind].model_fields) - {"kind"}
