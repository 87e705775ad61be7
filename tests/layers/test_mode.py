import pytest
import torch
from cases import MODE as BASE
from cases import D, assert_is_its_loop, build, contexts, tokens

from sparsemix.api import layer_cost
from sparsemix.config import ConfigError, parse
from sparsemix.layers import Ctx, LayerConfig, update
from sparsemix.layers.mode import separate_balance
from sparsemix.layers.router import route

TOKEN_CHOICE = {
    "two_picks": {},
    "one_pick": {"top_k": 1},
    "every_column": {"top_k": 8},
    "one_expert_one_noop": {"num_experts": 1, "num_noop": 1, "top_k": 1},
    "more_noops_than_experts": {"num_experts": 2, "num_noop": 5, "top_k": 3},
    "normalized": {"normalize_gates": True, "top_k": 3},
    "losses": {"balance_weight": 0.7, "z_weight": 0.3},
    "no_loss": {"balance_weight": 0.0},
    "gelu": {"activation": "gelu"},
}
EXPERT_CHOICE = {
    "two_picks": {},
    "one_pick": {"top_k": 1, "z_weight": 0.3},
    "every_column": {"top_k": 8},
    "one_expert_one_noop": {"num_experts": 1, "num_noop": 1, "top_k": 1},
    "more_noops_than_experts": {"num_experts": 2, "num_noop": 5, "top_k": 3, "activation": "gelu"},
}
CONTEXTS = pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "padded", "all")])
CHOICE = {"routing": "expert_choice"}


def observed(config, **kwargs):
    layer = build(config, **kwargs)
    update(layer, layer(tokens(3, 23))[1].stats)
    return layer


def leaning(config, towards_noop, **kwargs):
    """A layer whose no-op columns win (+) or lose (-) by a wide margin, and tokens that ask for it."""
    layer = build(config, **kwargs)
    with torch.no_grad():
        layer.router.weight[layer.config.num_experts :, 0] = towards_noop
    x = tokens(2, 63)
    x[..., 0] = 1.0
    return layer, x


@CONTEXTS
@pytest.mark.parametrize("causal", [False, True], ids=["training", "causal"])
@pytest.mark.parametrize("change", TOKEN_CHOICE.values(), ids=TOKEN_CHOICE)
def test_mode_by_token_choice_is_its_loop_over_tokens(change, causal, ctx):
    assert_is_its_loop(build(BASE | change), tokens(), ctx._replace(causal=causal))


@CONTEXTS
@pytest.mark.parametrize("causal", [False, True], ids=["training", "causal"])
@pytest.mark.parametrize("change", EXPERT_CHOICE.values(), ids=EXPERT_CHOICE)
def test_mode_by_expert_choice_is_its_loop_over_experts(change, causal, ctx):
    assert_is_its_loop(observed(BASE | CHOICE | change), tokens(), ctx._replace(causal=causal))


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("towards_noop", [30.0, -30.0])
def test_mode_is_its_loop_when_nearly_all_weight_is_on_one_side(routing, towards_noop):
    layer, x = leaning(BASE | {"routing": routing, "z_weight": 0.1}, towards_noop)
    update(layer, layer(tokens(2, 63))[1].stats)
    for ctx in (Ctx(), contexts(2, 63)["all"], Ctx(causal=True)):
        assert_is_its_loop(layer, x, ctx)


@pytest.mark.parametrize("training", [True, False])
def test_all_weight_on_the_noops_leaves_the_stream_exactly_alone(training):
    layer, x = leaning(BASE, 1000.0, train=training)
    y, aux = layer(x)
    assert torch.equal(y, torch.zeros_like(x))
    assert all(torch.isfinite(value) for value in aux.losses.values())
    (y.sum() + sum(aux.losses.values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    assert aux.stats["taken"].tolist() == [126.0] + [0.0] * 6
    if training:
        assert float(aux.stats["noop_share"]) == 1 and float(aux.stats["max_load"]) == 0
        cost = layer_cost(BASE, D, 63)
        assert 2 * cost.flops + float(aux.stats["extra_flops"]) == 2 * cost.items["router"]


def test_no_weight_on_the_noops_leaves_the_plain_mixture_of_experts():
    layer, x = leaning(BASE, -1000.0)
    moe = build({"kind": "moe", "num_experts": 6, "top_k": 2, "d_ff": 3})
    with torch.no_grad():
        moe.router.weight.copy_(layer.router.weight[:6])
        moe.experts.load_state_dict(layer.experts.state_dict())
    y, aux = layer(x, Ctx())
    torch.testing.assert_close(y, moe(x, Ctx())[0], rtol=0, atol=1e-12)
    assert float(aux.stats["noop_share"]) == 0


def test_a_pick_of_a_noop_adds_nothing_and_its_gate_gets_no_gradient_of_its_own():
    layer, x = build(BASE | {"top_k": 1, "balance_weight": 0.0}), tokens(2, 23).requires_grad_()
    y = layer(x, Ctx())[0]
    skipped = (layer.router(x).argmax(-1) >= 6).detach()
    assert 0 < int(skipped.sum()) < 46
    assert torch.equal((y == 0).all(-1), skipped)
    grads = torch.autograd.grad(y[skipped].sum(), [x, *layer.parameters()], materialize_grads=True)
    assert all(grad.abs().max() == 0 for grad in grads)


def test_the_noop_share_is_of_real_tokens_picks():
    layer, x, ctx = build(BASE), tokens(), contexts()["padded"]
    picks = layer.router(x).topk(2, dim=-1).indices[ctx.valid]
    stats = layer(x, ctx)[1].stats
    assert float(stats["noop_share"]) == pytest.approx(float((picks >= 6).double().mean()), abs=1e-12)
    real_picks = (picks < 6).sum(1)
    assert stats["taken"].tolist() == [int((real_picks == n).sum()) for n in range(7)]


def test_under_expert_choice_the_noop_share_is_of_tokens_that_nobody_took():
    layer, x, ctx = build(BASE | CHOICE | {"top_k": 1}), tokens(2, 23), contexts(2, 23)["padded"]
    y, aux = layer(x, ctx)
    alone = (y == 0).all(-1)[ctx.valid]
    assert int(alone.sum()) > 0
    assert float(aux.stats["noop_share"]) == pytest.approx(float(alone.double().mean()), abs=1e-12)


def test_usage_counts_real_experts_only():
    layer, x, ctx = build(BASE, train=False), tokens(), contexts()["padded"]
    probs = layer.router(x).softmax(-1)[ctx.valid].detach()
    gates, picks = probs.topk(2, dim=-1)
    stats = layer(x, ctx)[1].stats
    for e in range(6):
        assert float(stats["counts"][e]) == int((picks == e).sum())
        assert float(stats["gate_mass"][e]) == pytest.approx(float(gates[picks == e].sum()), abs=1e-12)
    assert stats["counts"].shape == (6,)


# FLOPs.


def test_it_costs_the_share_of_columns_that_are_real():
    mode, moe = layer_cost(BASE, D, 64), layer_cost({"kind": "moe", "num_experts": 6, "top_k": 2, "d_ff": 3}, D, 64)
    assert mode.items["experts"] == 6 / 8 * moe.items["experts"]
    assert mode.items["router"] == 8 / 6 * moe.items["router"]
    assert layer_cost(BASE | CHOICE, D, 64) == mode


def test_extra_flops_are_those_of_the_picks_beyond_the_target():
    layer, x, ctx = build(BASE), tokens(), contexts()["padded"]
    real = int((layer.router(x).topk(2, dim=-1).indices[ctx.valid] < 6).sum())
    one_row = 2 * 3 * D * 3
    assert float(layer(x, ctx)[1].stats["extra_flops"]) == one_row * (real - 14 * 2 * 6 / 8)


@pytest.mark.parametrize("E", [8, 16])
def test_the_control_of_reduced_capacity_costs_the_same_and_drops_what_noops_would_take(E):
    M, T = E // 4, 40
    mode = {"kind": "mode", "num_experts": E, "num_noop": M, "top_k": 2, "d_ff": 3}
    control = {"kind": "moe", "num_experts": E, "top_k": 2, "d_ff": 3, "capacity_factor": E / (E + M)}
    costs = [layer_cost(config, D, T).items["experts"] for config in (mode, control)]
    assert costs[0] == costs[1] == 2 * 3 * D * 3 * T * 2 * E / (E + M)
    x = tokens(2, T)
    assert float(build(control)(x, Ctx())[1].stats["dropped"]) >= M / (E + M) - 1e-12
    assert 0 < float(build(mode)(x, Ctx())[1].stats["noop_share"]) < 1


# Balance.


def balance_of(probs, top_k, E, valid=None):
    probs = torch.tensor(probs, dtype=torch.float64)
    return float(separate_balance(route(probs.log(), top_k, False), E, valid))


def test_balance_is_two_when_experts_and_sides_are_at_their_targets():
    probs = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]]
    for E in (1, 2, 3):
        assert balance_of(probs, 1, E) == pytest.approx(2, abs=1e-12)


def test_balance_by_hand():
    # Two experts, one no-op. First choices: expert 0 twice, no-op once; mean probabilities 0.4, 0.2, 0.4.
    probs = [[0.6, 0.2, 0.2], [0.5, 0.2, 0.3], [0.1, 0.2, 0.7]]
    within = 2 * (1 * 0.4 / 0.6 + 0 * 0.2 / 0.6)
    between = (2 / 3 * 0.6) / (2 / 3) + (1 / 3 * 0.4) / (1 / 3)
    assert balance_of(probs, 1, 2) == pytest.approx(within + between, abs=1e-12)


def test_collapse_to_either_side_costs_more_than_the_target():
    on_noop, on_real = [[0.01, 0.01, 0.98]] * 3, [[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]
    assert balance_of(on_noop, 1, 2) == pytest.approx(3 * 0.98, abs=1e-12)
    assert balance_of(on_real, 1, 2) == pytest.approx(1 + 3 / 2 * 0.99, abs=1e-12)


def test_the_balance_gradient_pulls_towards_the_side_with_too_little():
    for towards, sign in ((3.0, 1), (-3.0, -1)):
        logits = torch.randn(50, 8, dtype=torch.float64)
        logits[:, 6:] += towards
        logits.requires_grad_()
        (grad,) = torch.autograd.grad(separate_balance(route(logits, 2, False), 6, None), logits)
        assert float(grad[:, 6:].sum()) * sign > 0


def test_the_balance_gradient_is_its_finite_difference():
    logits, valid = torch.randn(7, 8, dtype=torch.float64).requires_grad_(), torch.arange(7) != 2
    assert torch.autograd.gradcheck(lambda z: separate_balance(route(z, 2, False), 6, valid), logits)


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, r"^top_k=9 must lie in \[1, num_experts \+ num_noop=8\]$"),
        ({**CHOICE, "normalize_gates": True}, r"^normalize_gates=True works with routing=token_choice only"),
        ({**CHOICE, "balance_weight": 0.1}, r"^balance_weight=0.1 works with routing=token_choice only"),
    ],
)
def test_settings_that_could_do_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(BASE | changes)


@pytest.mark.parametrize(("changes", "ahead"), [({}, False), (CHOICE, True), ({**CHOICE, "top_k": 8}, False)], ids=str)
def test_only_expert_choice_looks_ahead(changes, ahead):
    assert parse(LayerConfig, BASE | changes).looks_ahead == ahead


def test_the_causal_rule_of_expert_choice_asks_for_an_observation_first():
    with pytest.raises(RuntimeError, match="never observed"):
        build(BASE | CHOICE, train=False)(tokens())


# Staged: Mixture-of-Depths around a block around a mixture of experts is plain composition.


def test_staged_with_one_expert_is_mixture_of_depths_around_the_dense_block():
    attention = {"kind": "attention", "num_heads": 5}
    wrap = {"kind": "mod", "capacity": 0.5, "predictor_width": 3}
    moe = {"kind": "moe", "num_experts": 1, "top_k": 1, "d_ff": 7, "balance_weight": 0.0}
    staged = build(wrap | {"inner": {"kind": "block", "mixer": attention, "ffn": moe}})
    mod = build(wrap | {"inner": {"kind": "block", "mixer": attention, "ffn": {"kind": "dense", "d_ff": 7}}})
    weights = mod.state_dict()
    feed = {name: weights.pop(f"inner.ffn.{name}.weight") for name in ("gate", "up", "down")}
    weights["inner.ffn.experts.gate_up"] = torch.cat([feed["gate"], feed["up"]])[None]
    weights["inner.ffn.experts.down"] = feed["down"][None]
    weights["inner.ffn.router.weight"] = staged.state_dict()["inner.ffn.router.weight"]
    staged.load_state_dict(weights)
    x = tokens(2, 23)
    for ctx in (Ctx(), contexts(2, 23)["all"]):
        for causal in (False, True):
            (y, aux), (wanted, said) = (layer(x, ctx._replace(causal=causal)) for layer in (staged, mod))
            torch.testing.assert_close(y, wanted, rtol=0, atol=1e-11)
            assert set(aux.losses) == set(said.losses)
