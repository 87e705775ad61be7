import pytest
import torch
from cases import EXPERT_CHOICE as BASE
from cases import assert_is_its_loop, build, contexts, tokens

from sparsemix.api import layer_cost
from sparsemix.config import ConfigError, parse
from sparsemix.layers import Ctx, LayerConfig, update
from sparsemix.layers.threshold import quantile

GROUPS = ["sequence", "batch"]
SETTINGS = {
    "two_a_token": {},
    "one_token_each": {"capacity_factor": 0.01},
    "one_a_token": {"capacity_factor": 1.0},
    "uneven": {"capacity_factor": 3.3},
    "every_token": {"capacity_factor": 5.0},
    "more_than_every_token": {"capacity_factor": 9.0},
    "one_expert": {"num_experts": 1},
    "shared_expert": {"shared_d_ff": 4},
    "gelu": {"activation": "gelu", "shared_d_ff": 4},
}
CONTEXTS = pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "padded", "all")])


def observed(config, **kwargs):
    """A layer whose thresholds have seen a batch."""
    layer = build(config, **kwargs)
    update(layer, layer(tokens(3, 23))[1].stats)
    return layer


def taken_by(layer, x, ctx):
    """(B, T, E): which expert took which token, told by the gradient of the router-free part."""
    y = layer(x, ctx)[0]
    took = torch.zeros(*x.shape[:2], layer.config.num_experts, dtype=torch.bool)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            (grad,) = torch.autograd.grad(y[b, t].sum(), layer.experts.down, retain_graph=True)
            took[b, t] = grad.abs().sum((1, 2)) > 0
    return took


@CONTEXTS
@pytest.mark.parametrize("causal", [False, True], ids=["training", "causal"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_expert_choice_is_its_loop_over_experts(change, group, causal, ctx):
    layer = observed(BASE | {"group": group} | change)
    assert_is_its_loop(layer, tokens(), ctx._replace(causal=causal))


@pytest.mark.parametrize("favour", [30.0, -30.0], ids=["everyone_wants_one_expert", "nobody_wants_one_expert"])
@pytest.mark.parametrize("group", GROUPS)
def test_expert_choice_is_its_loop_when_affinities_are_extreme(group, favour):
    layer, x = build(BASE | {"group": group}), tokens(2, 63)
    x[..., 0] = 1.0
    with torch.no_grad():
        layer.router.weight[3, 0] = favour
    # Of other tokens: a threshold that is a token's own affinity is taken or not by its last bit.
    seen = tokens(2, 63)
    seen[..., 0] = 1.0
    update(layer, layer(seen)[1].stats)
    for ctx in (Ctx(), contexts(2, 63)["all"]):
        assert_is_its_loop(layer, x, ctx)
        assert_is_its_loop(layer, x, ctx._replace(causal=True))


@pytest.mark.parametrize(("factor", "quota"), [(0.01, 1), (1.0, 3), (2.0, 5), (2.2, 6), (5.0, 12)])
def test_every_expert_takes_exactly_its_quota_of_the_best_tokens_of_a_row(factor, quota):
    layer, x = build(BASE | {"capacity_factor": factor}), tokens(3, 12)
    took = taken_by(layer, x, Ctx())
    assert took.sum(1).tolist() == [[quota] * 5] * 3
    affinity = layer.router(x).softmax(-1)
    for b in range(3):
        for e in range(5):
            best = sorted(range(12), key=lambda t: (-float(affinity[b, t, e].detach()), t))[:quota]
            assert took[b, :, e].nonzero().flatten().tolist() == sorted(best)


def test_equal_affinities_go_to_the_earlier_tokens():
    layer = build(BASE | {"capacity_factor": 1.5})
    x = tokens(1, 1).expand(2, 10, -1)
    assert taken_by(layer, x, Ctx()).sum(2).tolist() == [[5] * 3 + [0] * 7] * 2


def test_padding_is_never_taken_and_shrinks_the_quota():
    valid = torch.zeros(4, 16, dtype=torch.bool)
    for b, n in enumerate([0, 1, 5, 16]):
        valid[b, torch.randperm(16)[:n]] = True
    layer, x = build(BASE | {"capacity_factor": 1.5}), tokens(4, 16)
    took = taken_by(layer, x, Ctx(valid=valid))
    assert not took[~valid].any()
    assert took.sum(1).tolist() == [[quota] * 5 for quota in (0, 1, 2, 5)]
    batch = build(BASE | {"capacity_factor": 1.5, "group": "batch"})
    assert taken_by(batch, x, Ctx(valid=valid)).sum((0, 1)).tolist() == [7] * 5


def test_a_sequence_group_keeps_rows_apart_and_a_batch_group_does_not():
    x = tokens(3, 11)
    for group, together in (("sequence", True), ("batch", False)):
        layer = build(BASE | {"group": group})
        apart = torch.cat([layer(row[None], Ctx())[0] for row in x])
        assert torch.allclose(layer(x, Ctx())[0], apart, rtol=0, atol=1e-12) == together


def test_one_row_is_the_same_group_either_way():
    x = tokens(1, 23)
    a, b = (build(BASE | {"group": group})(x, Ctx())[0] for group in GROUPS)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_one_expert_that_takes_everything_is_the_dense_layer(causal):
    layer, dense = build({"kind": "expert_choice", "num_experts": 1, "d_ff": 7}), build({"kind": "dense", "d_ff": 7})
    with torch.no_grad():
        layer.experts.gate_up.copy_(torch.cat([dense.gate.weight, dense.up.weight])[None])
        layer.experts.down.copy_(dense.down.weight[None])
    x = tokens()
    torch.testing.assert_close(layer(x, Ctx(causal=causal))[0], dense(x)[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_at_full_capacity_it_is_moe_with_every_expert(causal):
    x, E = tokens(), 5
    layer = build(BASE | {"capacity_factor": float(E)})
    moe = build({"kind": "moe", "num_experts": E, "top_k": E, "d_ff": 3})
    torch.testing.assert_close(layer(x, Ctx(causal=causal))[0], moe(x, Ctx())[0], rtol=0, atol=1e-12)
    assert not layer.config.looks_ahead and not dict(layer.named_buffers())


def test_one_expert_has_nothing_to_choose_by():
    with pytest.raises(
        ConfigError, match=r"^capacity_factor=0.5 must be at least 1 with num_experts=1, .*; mod routes to one$"
    ):
        build(BASE | {"num_experts": 1, "capacity_factor": 0.5})


# The causal rule.


def test_the_causal_rule_asks_for_an_observation_first():
    layer, x = build(BASE), tokens()
    with pytest.raises(RuntimeError, match=r"never observed: train first \(sparsemix.update"):
        layer.eval()(x)
    update(layer, layer.train()(x)[1].stats)
    layer.eval()(x)
    layer.threshold.forget()
    with pytest.raises(RuntimeError, match="never observed"):
        layer(x)


def test_a_token_is_taken_where_its_affinity_exceeds_the_threshold():
    layer, x = observed(BASE, train=True), tokens(2, 23)
    above = layer.router(x).softmax(-1) > layer.threshold.threshold
    assert torch.equal(taken_by(layer, x, Ctx(causal=True)), above)
    assert 0 < above.float().mean() < 1


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_on_the_batch_it_saw_the_causal_rule_takes_the_share_that_training_takes(factor):
    layer, x = build(BASE | {"capacity_factor": factor, "group": "batch"}), tokens(3, 20)
    update(layer, layer(x, Ctx())[1].stats)
    took = taken_by(layer, x, Ctx(causal=True)).sum((0, 1))
    assert took.tolist() == pytest.approx([60 * factor / 5] * 5, abs=1)


def test_the_thresholds_average_all_observations_at_first():
    layer, seen = build(BASE), []
    for _ in range(3):
        stats = layer(tokens(), Ctx())[1].stats
        seen.append(stats["threshold.quantile"])
        update(layer, stats)
    torch.testing.assert_close(layer.threshold.threshold, sum(seen) / 3, rtol=0, atol=1e-12)


def test_only_real_tokens_are_observed_and_a_batch_without_any_moves_nothing():
    layer, x = build(BASE), tokens(2, 9)
    valid = contexts(2, 9)["padded"].valid
    quantile_of = layer(x, Ctx(valid=valid))[1].stats["threshold.quantile"]
    affinity = layer.router(x[valid]).softmax(-1).detach()
    torch.testing.assert_close(quantile_of, affinity.quantile(1 - 2 / 5, dim=0), rtol=0, atol=1e-12)
    update(layer, {"threshold.quantile": quantile_of})
    nothing = layer(x, Ctx(valid=torch.zeros_like(valid)))[1].stats["threshold.quantile"]
    torch.testing.assert_close(nothing, layer.threshold.threshold, rtol=0, atol=0)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("N", [1, 2, 7, 64])
def test_the_static_quantile_is_torchs(N, q):
    scores = torch.rand(N, 3, dtype=torch.float64)
    valid = torch.rand(N) < 0.6
    valid[N // 2] = True
    torch.testing.assert_close(quantile(scores, None, q), scores.quantile(q, dim=0), rtol=0, atol=1e-12)
    torch.testing.assert_close(quantile(scores, valid, q), scores[valid].quantile(q, dim=0), rtol=0, atol=1e-12)


# Statistics and cost.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_taken_counts_real_tokens_by_how_many_experts_took_them(group, training):
    layer, x, ctx = observed(BASE | {"group": group}), tokens(), contexts()["padded"]
    ctx = ctx._replace(causal=not training)
    times = taken_by(layer, x, ctx).sum(2)[ctx.valid]
    taken = layer.train(training)(x, ctx)[1].stats["taken"]
    assert taken.tolist() == [int((times == n).sum()) for n in range(6)]
    assert taken.sum() == ctx.valid.sum()


def test_usage_counts_what_the_causal_rule_took():
    layer, x, ctx = observed(BASE), tokens(), contexts()["padded"]._replace(causal=True)
    took = taken_by(layer, x, ctx)
    gates = layer.router(x).softmax(-1).detach() * took
    stats = layer.eval()(x, ctx)[1].stats
    assert stats["counts"].tolist() == took.sum((0, 1)).tolist()
    torch.testing.assert_close(stats["gate_mass"], gates.sum((0, 1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(stats["top_gate"], gates.amax(2), rtol=0, atol=1e-12)


def test_there_is_no_loss():
    assert build(BASE)(tokens(), Ctx())[1].losses == {}


@pytest.mark.parametrize(("B", "T"), [(3, 7), (2, 5), (4, 1)])
def test_a_batch_group_says_what_rounding_up_once_saves(B, T):
    layer = build(BASE | {"group": "batch"})
    extra = float(layer(tokens(B, T), Ctx())[1].stats["extra_flops"])
    seats = {(3, 7): 9 - 3 * 3, (2, 5): 4 - 2 * 2, (4, 1): 2 - 4 * 1}[B, T]
    assert extra == 2 * 3 * 10 * 3 * 5 * seats <= 0


def test_it_costs_what_moe_costs_at_equal_picks():
    moe = layer_cost({"kind": "moe", "num_experts": 8, "top_k": 2, "d_ff": 5}, 16, 64)
    assert layer_cost({"kind": "expert_choice", "num_experts": 8, "capacity_factor": 2.0, "d_ff": 5}, 16, 64) == moe


@pytest.mark.parametrize(("factor", "ahead"), [(0.5, True), (4.9, True), (5.0, False), (8.0, False)])
def test_it_looks_ahead_unless_every_expert_takes_every_token(factor, ahead):
    assert parse(LayerConfig, BASE | {"capacity_factor": factor}).looks_ahead == ahead
