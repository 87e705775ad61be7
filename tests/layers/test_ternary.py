import pytest
import torch
import yaml
from cases import ATTENTION, BASES, DENSE, MOE, D, assert_is_its_loop, build, contexts, tokens
from torch.nn import functional as F

from sparsemix.api import build_model, layer_cost
from sparsemix.config import ConfigError, config_hash, parse, to_yaml
from sparsemix.layers import Ctx, LayerConfig, update
from sparsemix.layers.linear import Experts, Linear
from sparsemix.layers.ternary import PrecisionConfig, Warmup, quantised_rows, quantised_weight, ternary_linear
from sparsemix.ops.ternary_mm import int8_rows, reference, ternary

TERNARY = {"precision": "ternary"}
HALFWAY = {"precision": {"weights": "ternary", "warmup_steps": 4}}
MH_MOE = BASES["mh_moe"]
# Sums of codes are integers, so a ReLU may meet an exact 0 and attention without a norm an exact tie of rounding,
# where the rounding errors of a loop decide: these two have no comparison here.
LAYERS = {
    "attention": ATTENTION | TERNARY,
    "attention_grouped": {"kind": "attention", "num_heads": 5, "num_kv_heads": 1} | TERNARY,
    "attention_float_norm": ATTENTION | {"precision": {"sub_norm": True}},
    "dense": DENSE | TERNARY,
    "dense_silu": DENSE | TERNARY | {"activation": "silu"},
    "dense_no_norm": DENSE | {"precision": {"weights": "ternary", "sub_norm": False}},
    "dense_warming_up": DENSE | HALFWAY,
    "moe": MOE | TERNARY,
    "moe_shared": MOE | TERNARY | {"shared_d_ff": 4, "activation": "gelu", "z_weight": 0.1},
    "moe_every_expert": MOE | TERNARY | {"top_k": 5},
    "moe_one_expert": MOE | TERNARY | {"num_experts": 1, "top_k": 1},
    "moe_no_norm": MOE | {"precision": {"weights": "ternary", "sub_norm": False}},
    "moe_float_norm": MOE | {"precision": {"sub_norm": True}},
    "moe_warming_up": MOE | HALFWAY,
    "mh_moe": MH_MOE | TERNARY,
    "mh_moe_inner": MH_MOE | {"inner": MOE | TERNARY},
    "mh_moe_all": MH_MOE | TERNARY | {"inner": MOE | TERNARY, "bias": False},
    "moe_capacity": MOE | TERNARY | {"capacity_factor": 0.5},
    "expert_choice": {"kind": "expert_choice", "num_experts": 4, "capacity_factor": 1.5, "d_ff": 3, "shared_d_ff": 4}
    | TERNARY,
    "mode": {"kind": "mode", "num_experts": 4, "num_noop": 2, "top_k": 2, "d_ff": 3} | TERNARY,
    "mode_choice": {"kind": "mode", "num_experts": 4, "num_noop": 2, "top_k": 2, "d_ff": 3, "routing": "expert_choice"}
    | TERNARY,
    "mh_moe_shared": MH_MOE | TERNARY | {"shared_d_ff": 3},
    "block": {"kind": "block", "mixer": ATTENTION | TERNARY, "ffn": MOE | TERNARY},
    "mod": BASES["mod"] | {"inner": DENSE | TERNARY},
}


def some_steps(layer):
    """Warm-ups one and a half steps in, so that the share is no special value."""
    for module in layer.modules():
        if isinstance(module, Warmup):
            module.step.fill_(1)
    return layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "all")], ids=["plain", "all"])
def test_a_ternary_layer_is_its_loop_over_quantised_tokens_with_straight_through_gradients(name, ctx):
    assert_is_its_loop(some_steps(build(LAYERS[name])), tokens(), ctx)


@pytest.mark.parametrize("favour", [30.0, -30.0], ids=["all_on_one_expert", "one_expert_without_tokens"])
def test_a_ternary_mixture_is_its_loop_when_the_load_is_extreme(favour):
    layer, x = build(MOE | TERNARY | {"top_k": 1}), tokens(1, 23)
    x[..., 0] = 1.0
    with torch.no_grad():
        layer.router.weight[3, 0] = favour
    assert float(layer.eval()(x, Ctx())[1].stats["counts"][3]) == (23 if favour > 0 else 0)
    assert_is_its_loop(layer.train(), x, Ctx())


def test_the_gradient_is_that_of_a_plain_product_at_the_quantised_operands():
    x, weight, g = (torch.randn(*s, dtype=torch.float64) for s in ((7, 23), (5, 23), (7, 5)))
    y = ternary_linear(x.requires_grad_(), weight.requires_grad_(), None)
    dx, dw = torch.autograd.grad(y, (x, weight), g)
    codes, scale = ternary(weight.detach())
    rows, row_scale = int8_rows(x.detach())
    quantised_x, quantised_w = rows * row_scale, codes * scale
    torch.testing.assert_close(y.detach(), quantised_x @ quantised_w.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(dx, g @ quantised_w, rtol=0, atol=1e-11)
    torch.testing.assert_close(dw, g.T @ quantised_x, rtol=0, atol=1e-11)


def test_the_sums_of_a_training_forward_are_the_integers_of_inference():
    x, weight = torch.randn(63, 640) * 10 ** torch.randn(63, 1), torch.randn(33, 640)
    weight[0, 0], x[0, 0] = 1e30, -1e30
    rows, codes = quantised_rows(x, None)[0], quantised_weight(weight, None)[0]
    sums = F.linear(rows, codes)
    assert torch.equal(sums.to(torch.int32), reference.ternary_mm(int8_rows(x)[0], ternary(weight)[0]))
    assert torch.equal(sums, sums.round())


def test_the_codes_of_an_expert_bank_are_those_of_its_experts_alone():
    bank = Experts(3, 10, 7, "swiglu", PrecisionConfig(weights="ternary"))
    with torch.no_grad():
        bank.gate_up.mul_(torch.tensor([1.0, 1e-3, 40.0])[:, None, None])
        bank.gate_up[:, :7].mul_(5)
    codes, scale = quantised_weight(bank.gate_up.unflatten(1, (2, -1)), None)
    for e in range(3):
        for i, matrix in enumerate(bank.gate_up[e].chunk(2)):
            alone, alone_scale = ternary(matrix.detach())
            assert torch.equal(codes[e, i].detach(), alone.float())
            assert torch.equal(scale[e, i], alone_scale)


@pytest.mark.parametrize("kind", ["attention", "dense", "moe", "mh_moe"])
def test_latent_weights_stay_fp32_and_the_loss_falls(kind):
    inner = {"inner": MOE | TERNARY} if kind == "mh_moe" else {}
    layer = build(BASES[kind] | TERNARY | inner).float()
    x, target = tokens(4, 23).float(), 0.5 * tokens(4, 23).float()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        y, aux = layer(x)
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        (loss + sum(aux.losses.values())).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] < float(target.square().mean())


def test_a_weight_moves_by_less_than_its_code_and_still_trains():
    layer = Linear(5, 3, precision=PrecisionConfig(weights="ternary"))
    before, codes = layer.weight.detach().clone(), ternary(layer.weight.detach())[0]
    layer(torch.randn(7, 5)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-6).step()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(ternary(layer.weight.detach())[0], codes)


def test_the_share_of_quantisation_rises_once_per_update_and_stays_at_one():
    layer = build(DENSE | HALFWAY)
    plain, whole, x = build(DENSE | {"precision": {"sub_norm": True}}), build(DENSE | TERNARY), tokens()
    for other in (plain, whole):
        assert not other.load_state_dict({k: v for k, v in layer.state_dict().items() if "warmup" not in k})[0]
    seen = []
    for _ in range(6):
        y, aux = layer(x)
        seen.append(y.detach())
        layer(x)
        update(layer, aux.stats)
    torch.testing.assert_close(seen[0], plain(x)[0], rtol=0, atol=1e-11)
    far = [float((y - seen[0]).abs().max()) for y in seen]
    assert far[0] == 0 and far[1] > 0 and not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[4], whole(x)[0]) and torch.equal(seen[4], seen[5])
    assert int(layer.up.warmup.step) == 6
    layer.forget()
    assert int(layer.up.warmup.step) == 6


def test_the_warm_up_is_saved_and_only_there_where_it_is_asked_for():
    layer = build(DENSE | HALFWAY)
    update(layer, {})
    names = {name for name in layer.state_dict() if "warmup" in name}
    assert names == {f"{part}.warmup.step" for part in ("gate", "up", "down")}
    other = build(DENSE | HALFWAY, seed=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(tokens())[0], layer(tokens())[0]) or int(other.up.warmup.step) == 1
    assert not [name for name in build(DENSE | TERNARY).state_dict() if "warmup" in name]


def test_a_broken_row_is_seen_and_leaves_the_others_alone():
    layer, x = build(MOE | TERNARY, train=False), tokens()
    wanted = layer(x)[0]
    x[0, 3, 2] = float("nan")
    y = layer(x)[0]
    assert torch.isnan(y[0, 3]).any()
    others = torch.ones(x.shape[:2], dtype=torch.bool)
    others[0, 3] = False
    torch.testing.assert_close(y[others], wanted[others], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [LAYERS[name] for name in ("attention", "dense", "moe", "mh_moe_all")])
def test_a_zero_token_and_a_huge_one_give_finite_updates_and_gradients(config):
    layer, x = build(config).float(), tokens().float()
    x[0, 2], x[1, 3, 4] = 0.0, 1e6
    x.requires_grad_()
    y, aux = layer(x)
    (y.sum() + sum(aux.losses.values())).backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in (x, *layer.parameters()))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_changes_a_ternary_layer_only_by_bf16_rounding(name):
    layer, x = build(LAYERS[name]).float(), tokens().float().requires_grad_()
    wanted = layer(x)[0].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, aux = layer(x)
    (y.float().sum() + sum(aux.losses.values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *layer.parameters()) if p.grad is not None)
    assert float((y - wanted).detach().norm() / wanted.norm()) < 0.1


def test_a_plain_name_is_the_setting_and_survives_yaml():
    config = parse(LayerConfig, DENSE | TERNARY)
    assert config.precision == PrecisionConfig(weights="ternary")
    assert config == parse(LayerConfig, DENSE | {"precision": {"weights": "ternary"}})
    assert yaml.safe_load(to_yaml(config))["precision"] == "ternary"
    assert parse(LayerConfig, yaml.safe_load(to_yaml(config))) == config
    long = parse(LayerConfig, DENSE | HALFWAY)
    assert yaml.safe_load(to_yaml(long))["precision"] == {"weights": "ternary", "sub_norm": None, "warmup_steps": 4}
    assert parse(LayerConfig, yaml.safe_load(to_yaml(long))) == long
    assert len({config_hash(c) for c in (config, long, parse(LayerConfig, DENSE))}) == 3
    assert str(config.precision) == "ternary" and "warmup_steps 4" in str(long.precision)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ternery", r"^precision: 'ternery' is none of float, ternary; did you mean 'ternary'\?$"),
        ({"weights": "int3"}, r"^precision\.weights=int3 input should be 'float' or 'ternary'$"),
        ({"warmup_steps": 5}, r"^precision\.warmup_steps=5 needs weights: ternary$"),
        ({"weight": "ternary"}, r"^precision\.weight=ternary is no setting here; did you mean 'weights'\?"),
        (True, r"^precision=True must not be true or false$"),
        ({"weights": "ternary", "warmup_steps": -1}, r"^precision\.warmup_steps=-1 "),
    ],
)
def test_wrong_precisions_are_refused_in_one_line(value, message):
    with pytest.raises(ConfigError, match=message):
        build(DENSE | {"precision": value})


def test_a_ternary_weight_is_two_bits_and_its_norm_four_bytes():
    for config, norms in ((ATTENTION, D), (DENSE, 7)):
        plain, cost = layer_cost(config, D, 9), layer_cost(config | TERNARY, D, 9)
        assert cost.items == plain.items
        assert (cost.params, cost.active_params) == (plain.params + norms, plain.active_params + norms)
        assert cost.bytes == plain.bytes / 16 + 4 * norms
    plain, cost = layer_cost(MOE, D, 9), layer_cost(MOE | TERNARY, D, 9)
    router, expert = 5 * D, 3 * D * 3
    assert cost.params == plain.params + 5 * 3
    assert cost.bytes == 4 * router + 2 * (expert / 4 + 4 * 3)
    config = MH_MOE | TERNARY | {"bias": False}
    plain = layer_cost(config | {"precision": "float"}, D, 9)
    assert layer_cost(config, D, 9).bytes == plain.bytes - 2 * (4 - 1 / 4) * D**2 + 4 * D
    one_head = {"kind": "mh_moe", "num_heads": 1, "inner": MOE | TERNARY} | TERNARY
    assert layer_cost(one_head, D, 9).bytes == pytest.approx(2 * D**2 / 4 + 4 * D + cost.bytes)


def test_a_router_a_norm_and_an_embedding_are_never_ternary():
    model = build_model(MODEL)
    ternary_names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (Linear, Experts)) and module.precision.ternary
    }
    assert ternary_names == {
        *(f"blocks.0.mixer.{name}" for name in "qkvo"),
        *(f"blocks.0.ffn.{name}" for name in ("gate", "up", "down")),
        *(f"blocks.1.inner.mixer.{name}" for name in "qkvo"),
        "blocks.1.inner.ffn.experts",
        *(f"blocks.1.inner.ffn.shared.{name}" for name in ("gate", "up", "down")),
        *(f"blocks.2.mixer.{name}" for name in "qkvo"),
        "blocks.2.ffn.head",
        "blocks.2.ffn.merge",
        "blocks.2.ffn.inner.experts",
        *(f"blocks.3.mixer.{name}" for name in "qkvo"),
    }


def block(ffn):
    return {"kind": "block", "mixer": {"kind": "attention", "num_heads": 2}, "ffn": ffn}


SMALL_MOE = {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 6}
PEER = {"kind": "peer", "num_experts": 16, "num_heads": 2, "top_k": 3, "d_key": 4}
# Every kind, with one word for all of them.
MODEL = {
    "d_model": 16,
    "vocab_size": 64,
    "seq_len": 32,
    "precision": "ternary",
    "blocks": [
        block({"kind": "dense", "d_ff": 24}),
        {"kind": "mod", "inner": block(SMALL_MOE | {"shared_d_ff": 8}), "capacity": 0.5},
        block({"kind": "mh_moe", "num_heads": 2, "inner": SMALL_MOE}),
        block(PEER),
    ],
}
