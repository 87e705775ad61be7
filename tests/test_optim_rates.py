import copy

import pytest
import torch

from sparsemix.api import build_layer, build_model, build_optimizer
from sparsemix.config import ConfigError
from sparsemix.optim import ONE_RATE, Rates
from sparsemix.optim.rates import trainable

DENSE = {"kind": "dense", "d_ff": 6}
ATTENTION = {"kind": "attention", "num_heads": 2}
KEYS = {"num_heads": 2, "top_k": 3, "d_key": 4}
MOE = {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 5, "shared_d_ff": 3}


def block(ffn):
    return {"kind": "block", "mixer": ATTENTION, "ffn": ffn}


def model(*ffns, **settings):
    blocks = [block(ffn) for ffn in ffns] + [{"kind": "mod", "inner": block(DENSE)}]
    return build_model({"d_model": 8, "vocab_size": 17, "seq_len": 9, "blocks": blocks, **settings})


def roles_of(module):
    return {f"{at.path}.{at.name}": at.role for at in trainable(module)}


def test_every_parameter_has_the_role_that_its_layer_says():
    layers = model({"kind": "peer", "num_experts": 16, **KEYS}, {"kind": "pkm", "num_values": 16, **KEYS}, MOE)
    found = roles_of(layers)
    query = dict.fromkeys(("query.weight", "query.bias", "query_norm.weight", "query_norm.bias"), "query")
    peer = query | {"sub_keys": "keys", "w_in": "tables", "w_out": "tables"}
    moe = {"router.weight": "router", "experts.gate_up": "experts", "experts.down": "experts"}
    mod = {f"predictor.{part}": "predictor" for part in ("up.weight", "up.bias", "down.weight", "down.bias")}
    for path, named in (
        ("blocks.0.ffn", peer),
        ("blocks.1.ffn", query | {"sub_keys": "keys", "value_vectors": "tables"}),
        ("blocks.2.ffn", moe | {f"shared.{name}.weight": "trunk" for name in ("gate", "up", "down")}),
        ("blocks.3", mod | {"router.weight": "router"}),
    ):
        under = {name.removeprefix(path + "."): role for name, role in found.items() if name.startswith(path + ".")}
        assert {
            name: role
            for name, role in under.items()
            if "mixer" not in name and "inner" not in name and ("norm" not in name or "query_norm" in name)
        } == named
    assert found["embed.weight"] == "embedding"
    assert found["norm.weight"] == found["blocks.0.mixer.q.weight"] == "trunk"


def test_the_head_moves_as_the_embedding_and_ternary_matrices_as_such_wherever_they_are():
    ternary = model(MOE, {"kind": "mh_moe", "num_heads": 2, "inner": MOE}, precision="ternary", tie_embeddings=False)
    found = roles_of(ternary)
    assert found["lm_head.weight"] == "embedding"
    for name in ("0.mixer.q.weight", "0.ffn.experts.down", "0.ffn.shared.up.weight", "1.ffn.head.weight"):
        assert found[f"blocks.{name}"] == "ternary"
    assert found["blocks.0.ffn.router.weight"] == "router"
    plain = roles_of(build_layer({"kind": "mh_moe", "num_heads": 2, "inner": MOE}, 8))
    assert plain["head.weight"] == plain["merge.weight"] == "merge"


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_a_role_moves_at_its_multiple_of_the_rate(matrices):
    kinds = [{"kind": "peer", "num_experts": 16, **KEYS}, MOE]
    rates = {role: 1 + i / 8 for i, role in enumerate(Rates.model_fields)}
    moved = []
    for setting in (ONE_RATE, rates):
        torch.manual_seed(0)
        layers = model(*kinds)
        before = copy.deepcopy(layers.state_dict())
        optimizer = build_optimizer(layers, lr=1e-3, weight_decay=0.0, matrices=matrices, rates=setting)
        optimizer.set_lr(1e-3)
        tokens = torch.arange(18).view(2, 9) % 17
        out = layers(tokens)
        (out.logits.square().sum() + sum(out.aux.losses.values())).backward()
        optimizer.step()
        moved.append({name: p.detach() - before[name] for name, p in layers.named_parameters()})
    roles = roles_of(layers)
    for name, one in moved[0].items():
        role = roles[name if "." in name else f".{name}"]
        torch.testing.assert_close(moved[1][name], one * rates[role], rtol=2e-2, atol=2e-6)
    assert any(float(change.abs().max()) > 5e-4 for change in moved[0].values())


def test_a_rate_below_zero_and_an_unknown_role_are_refused():
    layer = build_layer(MOE, 8)
    with pytest.raises(ConfigError, match="keys=-1"):
        build_optimizer(layer, 1e-3, rates={"keys": -1})
    with pytest.raises(ConfigError, match=r"key=2.* is no setting here; did you mean 'keys'"):
        build_optimizer(layer, 1e-3, rates={"key": 2})


def test_a_state_saved_when_all_roles_had_one_rate_goes_on_at_one_rate():
    layer = build_layer({"kind": "peer", "num_experts": 16, **KEYS}, 8)
    old = build_optimizer(layer, 1e-3, rates=ONE_RATE).state_dict()
    for group in old["param_groups"]:
        del group["rate"]
    optimizer = build_optimizer(layer, 1e-3, rates=ONE_RATE)
    optimizer.load_state_dict(old)
    optimizer.set_lr(0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        ({"kind": "peer", "num_experts": 16, **KEYS}, "w_out"),
        ({"kind": "pkm", "num_values": 16, **KEYS}, "value_vectors"),
    ],
    ids=["peer", "pkm"],
)
def test_rows_that_write_to_the_stream_start_at_a_multiple_of_their_scale(settings, table):
    layers = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        layers.append(build_layer(settings | {"init_scale": scale}, 8))
    torch.testing.assert_close(getattr(layers[1], table), 0.25 * getattr(layers[0], table))
