import pytest
import torch
from cases import BASES
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsemix.api import build_model, layer_cost
from sparsemix.config import parse
from sparsemix.layers import Ctx, LayerConfig
from sparsemix.model import ModelConfig
from sparsemix.ops.flop_counter import count_flops

D = 20
ATTENTION, DENSE, PEER = BASES["attention"], BASES["dense"], BASES["peer"]
MOE, PKM = BASES["moe"], BASES["pkm"]
EXPERT_CHOICE, MODE = BASES["expert_choice"], BASES["mode"]
BLOCK = {"kind": "block", "mixer": ATTENTION, "ffn": DENSE}
MOD = BASES["mod"]
CASES = {
    **BASES,
    "attention_grouped": {"kind": "attention", "num_heads": 10, "num_kv_heads": 2},
    "attention_wide": ATTENTION | {"d_head": 6, "bias": "all", "qk_norm": "full", "num_kv_heads": 1},
    "attention_qwen": ATTENTION | {"d_head": 2, "bias": "qkv", "qk_norm": "head", "num_kv_heads": 1, "window": 5},
    "attention_unturned": ATTENTION | {"rope_theta": None},
    "attention_wide_ternary": ATTENTION | {"d_head": 6, "bias": "qkv", "precision": "ternary"},
    "dense_bias": DENSE | {"bias": True},
    "dense_bias_ternary": DENSE | {"bias": True, "activation": "gelu_tanh", "precision": "ternary"},
    "block_layer_norm": BLOCK | {"norm": "layer"},
    **{f"dense_{name}": DENSE | {"activation": name} for name in ("geglu", "gelu", "gelu_tanh", "relu", "silu")},
    **{f"moe_{name}": MOE | {"activation": name} for name in ("geglu", "gelu", "gelu_tanh", "relu", "silu")},
    "attention_ternary": ATTENTION | {"precision": "ternary"},
    "expert_choice_ternary": BASES["expert_choice"] | {"precision": "ternary"},
    "mode_choice_ternary": BASES["mode"]
    | {"precision": "ternary", "routing": "expert_choice", "z_weight": 0.0}
    | ({"balance_weight": None, "normalize_gates": False}),
    "dense_ternary": DENSE | {"precision": "ternary"},
    "moe_ternary": MOE | {"precision": "ternary", "activation": "relu"},
    "mh_moe_ternary": BASES["mh_moe"] | {"num_heads": 4, "precision": "ternary"},
    "mh_moe_all_ternary": BASES["mh_moe"] | {"inner": MOE | {"precision": "ternary"}, "precision": "ternary"},
    "moe_all": MOE | {"top_k": 5},
    "moe_one": {"kind": "moe", "num_experts": 1, "top_k": 1, "d_ff": 1},
    "moe_half": MOE | {"capacity_factor": 0.5},
    "moe_roomy": MOE | {"capacity_factor": 1.25, "top_k": 1},
    "moe_room_for_all": MOE | {"capacity_factor": 4.0},
    "expert_choice_batch": EXPERT_CHOICE | {"group": "batch", "capacity_factor": 0.7},
    "expert_choice_all": EXPERT_CHOICE | {"capacity_factor": 9.0, "activation": "relu"},
    "expert_choice_one": {"kind": "expert_choice", "num_experts": 1, "d_ff": 2},
    "mode_choice": MODE | {"routing": "expert_choice", "top_k": 3},
    "mode_top_1": MODE | {"num_experts": 2, "top_k": 1, "activation": "gelu"},
    "mode_all": MODE | {"top_k": 8},
    "peer_apart": PEER | {"share_keys": False, "query_norm": "layer"},
    "peer_none": PEER | {"num_experts": 64, "top_k": 13, "query_norm": "none", "gate": "relu"},
    "pkm_shared": PKM | {"share_keys": True, "query_norm": "layer"},
    "pkm_none": PKM | {"num_values": 64, "top_k": 13, "query_norm": "none"},
    "mh_moe_pkm": BASES["mh_moe"] | {"inner": PKM},
    "mh_moe_no_bias": BASES["mh_moe"] | {"num_heads": 4, "bias": False},
    "mh_moe_shared": BASES["mh_moe"] | {"shared_d_ff": 7, "num_heads": 4},
    "mh_moe_peer": BASES["mh_moe"] | {"inner": PEER},
    "mod_threshold": MOD | {"sampling": "threshold", "capacity": 0.3},
    "mod_eighth": MOD | {"capacity": 0.125},
    "mod_all": MOD | {"capacity": 1.0},
    "mod_moe": MOD | {"inner": BLOCK | {"ffn": MOE}, "capacity": 0.3},
    "mod_mode": MOD | {"inner": BLOCK | {"ffn": MODE}, "capacity": 0.3},
    "mod_peer": MOD | {"inner": BLOCK | {"ffn": PEER}},
    "mod_pkm": MOD | {"inner": BLOCK | {"ffn": PKM}},
    "mod_in_mod": MOD | {"inner": MOD | {"capacity": 0.3}, "capacity": 0.7},
    "mod_in_mh_moe_in_mod": MOD | {"inner": {"kind": "mh_moe", "num_heads": 2, "inner": MOD}},
    "block_of_mods": {"kind": "block", "mixer": MOD | {"inner": ATTENTION}, "ffn": MOD | {"inner": DENSE}},
}
CASES["mod_in_mh_moe_in_mod"]["inner"]["inner"] = MOD | {"inner": DENSE}


def extra_flops(stats):
    """What routing spent beyond the cost, for layers in which it decides."""
    return sum(float(value) for name, value in stats.items() if name.rpartition(".")[2] == "extra_flops")


@pytest.mark.parametrize("T", [1, 23, 64])
@pytest.mark.parametrize("name", CASES)
def test_cost_is_what_a_counter_sees(name, T):
    config = parse(LayerConfig, CASES[name])
    layer, cost = config.build(D), config.cost(D, T)
    said = {}
    with torch.no_grad():
        spent = count_flops(lambda: said.update(layer(torch.randn(1, T, D), Ctx())[1].stats))
    assert spent == pytest.approx(cost.flops + extra_flops(said), rel=1e-14)
    assert sum(parameter.numel() for parameter in layer.parameters()) == cost.params
    if "ternary" not in name:
        assert cost.bytes == 4 * cost.active_params
    assert cost.active_params <= cost.params


def scored_but_not_picked(config, T):
    """FLOPs of the scores of those sub-keys that product keys do not pick: n - top_k a side, head and token."""
    if config["kind"] in ("pkm", "peer"):
        settings = parse(LayerConfig, config)
        return 2 * T * settings.num_heads * settings.d_key * (settings.n - settings.top_k)
    inner = [scored_but_not_picked(value, T) for value in config.values() if isinstance(value, dict)]
    return sum(inner) * (config["num_heads"] if config["kind"] == "mh_moe" else 1)


# Attention counts its backward only in plain matrix products, which the MATH backend is made of.
@pytest.mark.parametrize(
    "name", [name for name, raw in CASES.items() if "predictor" not in layer_cost(raw, D, 23).items]
)
def test_a_training_step_costs_three_forwards_but_for_sub_keys_that_nobody_picked(name):
    layer, x, said = parse(LayerConfig, CASES[name]).build(D), torch.randn(1, 23, D, requires_grad=True), {}

    def step():
        y, aux = layer(x, Ctx())
        said.update(aux.stats)
        y.sum().backward()

    with sdpa_kernel(SDPBackend.MATH):
        spent = count_flops(step)
    # Their scores get no gradient, so neither queries nor keys get one from them.
    wanted = 3 * (layer_cost(CASES[name], D, 23).flops + extra_flops(said)) - 2 * scored_but_not_picked(CASES[name], 23)
    assert spent == pytest.approx(wanted, rel=1e-14)


def test_a_predictor_skips_the_gradient_towards_its_input_and_so_costs_a_little_less_than_three_forwards():
    layer, x = parse(LayerConfig, MOD).build(D), torch.randn(1, 23, D, requires_grad=True)

    def step():
        y, aux = layer(x, Ctx())
        (y.sum() + aux.losses["predictor"]).backward()

    with sdpa_kernel(SDPBackend.MATH):
        spared = 2 * D * MOD["predictor_width"] * 23
        assert count_flops(step) == 3 * layer_cost(MOD, D, 23).flops - spared


def test_a_model_costs_its_blocks_and_its_logits():
    raw = {"d_model": D, "vocab_size": 37, "seq_len": 23, "blocks": [BLOCK, MOD, BLOCK | {"ffn": MOE}]}
    model, config = build_model(raw), parse(ModelConfig, raw)
    with torch.no_grad():
        assert count_flops(lambda: model(torch.randint(37, (1, 23)))) == config.cost().flops
    assert config.cost().items["logits"] == 2 * 23 * D * 37
    assert sum(parameter.numel() for parameter in model.parameters()) == config.cost().params
    routed = layer_cost(MOD, D, 23).flops + layer_cost(MOE, D, 23).flops
    assert config.outside_flops() == config.cost().flops - routed


def test_tables_of_an_untied_model_count_where_they_are_multiplied_or_looked_up():
    raw = {"d_model": D, "vocab_size": 37, "seq_len": 23, "blocks": [BLOCK]}
    more = {"norm": "layer", "tie_embeddings": False, "learned_positions": 29}
    model, config = build_model(raw | more), parse(ModelConfig, raw | more)
    with torch.no_grad():
        assert count_flops(lambda: model(torch.randint(37, (1, 23)))) == config.cost().flops
    assert config.cost().flops == parse(ModelConfig, raw).cost().flops
    assert sum(parameter.numel() for parameter in model.parameters()) == config.cost().params
    # One row of each table that is looked up, and the bias of every norm.
    assert config.cost().active_params == parse(ModelConfig, raw).cost().active_params + 2 * D + 3 * D
    assert config.cost().bytes == 4 * config.cost().active_params


def block_of(d, d_ff):
    ffn = {"kind": "dense", "d_ff": d_ff, "activation": "gelu"}
    return {"kind": "block", "mixer": {"kind": "attention", "num_heads": d // 64}, "ffn": ffn}


# A vocabulary of 32,000 gives the last column; 32,768 would give 0.637, 0.605, 0.582, 0.583, 0.576 and 0.567.
@pytest.mark.parametrize(
    ("d", "depth", "params", "blocks_only", "with_logits"),
    [
        (512, 12, 38e6, 0.541, 0.636),
        (1024, 14, 176e6, 0.549, 0.604),
        (768, 28, 198e6, 0.546, 0.582),
        (1280, 22, 433e6, 0.551, 0.582),
        (1792, 24, 925e6, 0.554, 0.576),
        (2560, 36, 2.83e9, 0.556, 0.567),
    ],
)
def test_mixture_of_depths_saves_the_published_share_of_flops(d, depth, params, blocks_only, with_logits):
    dense = layer_cost(block_of(d, 4 * d), d, 2048)
    mod = {"kind": "mod", "capacity": 0.125, "sampling": "threshold", "inner": block_of(d, 4 * d)}
    routed = layer_cost(mod, d, 2048)
    full, mixed = depth * dense.flops, depth / 2 * (dense.flops + routed.flops)
    logits = 2 * 2048 * d * 32_000
    assert depth * dense.params == pytest.approx(params, rel=0.01)
    assert round(mixed / full, 3) == blocks_only
    assert round((mixed + logits) / (full + logits), 3) == with_logits


def moe_of(E, k, f):
    return {"kind": "moe", "num_experts": E, "top_k": k, "d_ff": f}


@pytest.mark.parametrize(
    ("config", "gate_macs", "params"),
    [
        (moe_of(8, 1, 2048), 6_144, 37_748_736),
        (moe_of(16, 2, 1024), 12_288, 37_748_736),
        ({"kind": "mh_moe", "num_heads": 2, "inner": moe_of(40, 2, 768)}, 30_720, 36_569_088),
        ({"kind": "mh_moe", "num_heads": 3, "inner": moe_of(96, 3, 512)}, 73_728, 38_928_384),
    ],
    ids=["smoe", "fine_grained", "two_heads", "three_heads"],
)
def test_the_published_expert_layers_multiply_equally_often(config, gate_macs, params):
    cost = layer_cost(config, 768, 1)
    macs = {name: flops / 2 for name, flops in cost.items.items()}
    assert macs.pop("router") == gate_macs
    assert sum(macs.values()) == 4_718_592
    heads = config.get("num_heads", 1)
    assert cost.params - config.get("inner", config)["num_experts"] * 768 // heads == params


MILLION = {"kind": "peer", "num_experts": 1024**2, "num_heads": 8, "top_k": 16, "d_key": 256}


def test_a_million_experts_cost_what_the_paper_implies():
    cost = layer_cost(MILLION, 1024, 1)
    query, scores = 2 * 1024 * 8 * 256, 2 * 8 * 1024 * 256
    assert cost.items == {"router": query + scores, "experts": 4 * 8 * 16 * 1024}
    assert query == scores == 4_194_304
    assert cost.items["router"] == 16 * cost.items["experts"]
    router = (1024 + 1) * 2048 + 2 * 2048 + 1024 * 256
    assert cost.params == 2 * 1024**2 * 1024 + router
    assert cost.active_params == 2 * 8 * 16 * 1024 + router


@pytest.mark.parametrize(
    ("depth", "millions"),
    [
        *((4, 29.1), (5, 45.3), (6, 67.1), (7, 96.4), (8, 134.2), (9, 181.1), (10, 238.0)),
        *((11, 307.2), (12, 390), (13, 487), (14, 598), (16, 871), (18, 1223)),
    ],
)
def test_the_dense_family_of_the_peer_paper_has_its_parameters(depth, millions):
    d = 128 * depth
    dense = {
        "d_model": d,
        "vocab_size": 32_000,
        "seq_len": 2048,
        "blocks": {"count": depth, "each": block_of(d, 4 * d)},
    }
    params = parse(ModelConfig, dense).cost().params
    assert params == pytest.approx(millions * 1e6, rel=0.01)
    assert params == pytest.approx(12 * depth * d**2 + 32_000 * d, rel=0.001)
    peer = dense | {"blocks": dense["blocks"] | {"ffn": {"at": "middle", **MILLION}}}
    router = layer_cost(MILLION, d, 1).params - 2 * 1024**2 * d
    assert parse(ModelConfig, peer).cost().params == params - 8 * d**2 + 2 * 1024**2 * d + router


def test_active_parameters_are_those_one_token_touches():
    expert = 3 * D * MOE["d_ff"]
    shared, router = 3 * D * MOE["shared_d_ff"], D * MOE["num_experts"]
    assert layer_cost(MOE, D, 9).active_params == MOE["top_k"] * expert + shared + router
    whole, mod = layer_cost(BLOCK, D, 9), layer_cost(MOD | {"inner": BLOCK, "sampling": "threshold"}, D, 9)
    assert mod.active_params == D + 0.5 * whole.active_params
