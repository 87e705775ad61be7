import pytest
import torch
from cases import build, contexts, tokens

from sparsemix.layers import Ctx, update
from sparsemix.layers.query_norm import QueryBatchNorm

PEER = {"kind": "peer", "num_experts": 9, "num_heads": 2, "top_k": 3, "d_key": 4}
MOD = {"kind": "mod", "capacity": 0.5, "sampling": "threshold", "inner": {"kind": "dense", "d_ff": 3}}
PKM = {"kind": "pkm", "num_values": 9, "num_heads": 2, "top_k": 3, "d_key": 4}
STATEFUL = {"peer": PEER, "pkm": PKM, "mod": MOD}


def state(layer):
    return {name: value.clone() for name, value in layer.named_buffers()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("config", STATEFUL.values(), ids=STATEFUL)
def test_forward_only_observes_and_update_moves_once(config):
    layer = build(config)
    before = state(layer)
    stats = layer(tokens())[1].stats
    layer(tokens())
    assert same(before, state(layer))
    update(layer, stats)
    after = state(layer)
    assert not same(before, after)
    layer(tokens())
    layer.eval()(tokens())
    assert same(after, state(layer))
    assert [int(value) for name, value in after.items() if name.endswith("num_updates")] == [1]


@pytest.mark.parametrize("config", STATEFUL.values(), ids=STATEFUL)
def test_evaluating_before_any_observation_says_what_to_do(config):
    layer = build(config, train=False)
    with pytest.raises(RuntimeError, match=r"never observed: train first \(sparsemix.update\(module, aux.stats\)"):
        layer(tokens())


@pytest.mark.parametrize("config", STATEFUL.values(), ids=STATEFUL)
def test_forget_returns_to_never_observed(config):
    layer = build(config)
    update(layer, layer(tokens())[1].stats)
    layer.eval()(tokens())
    for module in layer.modules():
        if hasattr(module, "forget"):
            module.forget()
    with pytest.raises(RuntimeError, match="never observed"):
        layer(tokens())
    x = tokens()
    update(layer.train(), layer(x)[1].stats)
    fresh = build(config)
    update(fresh, fresh(x)[1].stats)
    assert same(state(layer), state(fresh))


@pytest.mark.parametrize("config", STATEFUL.values(), ids=STATEFUL)
def test_padding_is_no_observation(config):
    layer, x, ctx = build(config), tokens(), contexts()["padded"]
    stats = layer(x, ctx)[1].stats
    other = torch.where(ctx.valid[..., None], x, 1e3 * torch.randn_like(x))
    for name, value in layer(other, ctx)[1].stats.items():
        torch.testing.assert_close(value, stats[name], rtol=0, atol=1e-12)


def test_query_statistics_are_those_of_the_real_queries():
    layer, x, ctx = build(PEER), tokens(), contexts()["padded"]
    stats = layer(x, ctx)[1].stats
    queries = layer.query(x[ctx.valid]).view(-1, 2, 4)
    torch.testing.assert_close(stats["query_norm.mean"], queries.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(stats["query_norm.square"], queries.square().mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [PEER, PKM], ids=["peer", "pkm"])
def test_autocast_reaches_neither_query_statistics_nor_picks(config):
    layer, x = build(config).float(), tokens(2, 23).float()
    wanted = layer(x)[1].stats
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = layer(x)[1].stats
    assert set(stats) == {"query_norm.mean", "query_norm.square"}
    for name, value in stats.items():
        assert value.dtype == torch.float64
        assert torch.equal(value, wanted[name])
    update(layer, stats)
    counts = layer.eval()(x)[1].stats["counts"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x)[1].stats["counts"], counts)


def test_averaged_micro_batches_are_one_big_batch():
    parts, whole = [tokens(2, 7) for _ in range(3)], build(PEER)
    update(whole, whole(torch.cat(parts))[1].stats)
    layer = build(PEER)
    stats = [layer(part)[1].stats for part in parts]
    update(layer, {name: sum(s[name] for s in stats) / 3 for name in stats[0]})
    for name, value in state(whole).items():
        torch.testing.assert_close(state(layer)[name], value, rtol=0, atol=1e-12)


def test_the_first_updates_are_a_plain_average_that_leans_on_no_initial_value():
    layer, seen = build(PEER), []
    for _ in range(4):
        seen.append(layer(tokens())[1].stats)
        update(layer, seen[-1])
    for name in ("mean", "square"):
        average = sum(s[f"query_norm.{name}"] for s in seen) / 4
        torch.testing.assert_close(getattr(layer.query_norm, name), average, rtol=0, atol=1e-12)


def test_later_updates_move_by_the_momentum():
    layer = build(PEER)
    for _ in range(20):
        update(layer, layer(tokens())[1].stats)
    before, stats = layer.query_norm.mean.clone(), layer(tokens())[1].stats
    update(layer, stats)
    torch.testing.assert_close(layer.query_norm.mean, before.lerp(stats["query_norm.mean"], 0.1), rtol=0, atol=1e-12)


def test_statistics_of_the_evaluated_batch_make_evaluation_equal_training():
    layer, x = build(PEER), tokens()
    y, aux = layer(x)
    update(layer, aux.stats)
    torch.testing.assert_close(layer.eval()(x)[0], y, rtol=0, atol=1e-11)


def test_an_update_reaches_layers_below_wrappers_and_only_their_own_entries():
    inner = {"kind": "block", "mixer": {"kind": "attention", "num_heads": 5}, "ffn": PEER}
    layer = build({"kind": "mod", "capacity": 0.5, "inner": inner})
    stats = layer(tokens())[1].stats
    assert {name for name in stats if "query_norm" in name} == {
        "inner.ffn.query_norm.mean",
        "inner.ffn.query_norm.square",
    }
    update(layer, stats)
    assert int(layer.inner.ffn.query_norm.num_updates) == 1
    torch.testing.assert_close(layer.inner.ffn.query_norm.mean, stats["inner.ffn.query_norm.mean"])


def test_the_threshold_is_the_score_that_the_capacity_share_exceeds():
    layer, x = build(MOD | {"capacity": 0.25}), tokens(4, 64)
    update(layer, layer(x)[1].stats)
    routed = layer.eval()(x, Ctx(causal=True))[1].stats["routed"]
    assert int(routed.sum()) == 64


@pytest.mark.parametrize("kind", ["layer", "none"])
def test_other_query_norms_have_no_state_and_evaluate_at_once(kind):
    layer, x = build(PEER | {"query_norm": kind}), tokens()
    y, aux = layer(x)
    assert not aux.stats
    assert not state(layer)
    torch.testing.assert_close(layer.eval()(x)[0], y, rtol=0, atol=0)


def test_a_causal_context_uses_running_statistics_even_while_training():
    layer = QueryBatchNorm(2, 4).double().train()
    query = torch.randn(9, 2, 4, dtype=torch.float64)
    _, stats = layer(query, None)
    layer.update(stats)
    y, stats = layer(query, None, causal=True)
    alone, _ = layer(query[:1], None, causal=True)
    torch.testing.assert_close(y[:1], alone, rtol=0, atol=1e-11)
    assert "mean" in stats  # still observed, for update
    control, _ = layer(query[:1], None)
    assert (y[:1] - control).abs().max() > 1e-3


FAR = {"mean/std 1e3": 1e3, "mean/std 1e5": 1e5}


def far_queries(away, N=257):
    torch.manual_seed(5)
    return (torch.randn(N, 2, 4, dtype=torch.float64) + away).float()


@pytest.mark.parametrize("away", FAR.values(), ids=FAR)
def test_queries_far_from_zero_are_normalised_as_in_fp64(away):
    layer, query = QueryBatchNorm(2, 4).train(), far_queries(away)
    exact = query.double()
    wanted = (exact - exact.mean(0)) / (exact.var(0, correction=0) + layer.eps).sqrt()
    y, stats = layer(query, None)
    # What is left is the rounding of the mean.
    close = {"rtol": 1e-4, "atol": 4 * torch.finfo(torch.float32).eps * away}
    torch.testing.assert_close(y.double(), wanted, **close)
    # The control: from E[q^2] - E[q]^2 in fp32.
    naive = (query.square().mean(0) - query.mean(0).square()).clamp_min(0)
    assert (naive.double() / exact.var(0, correction=0) - 1).abs().max() > 0.05
    layer.update(stats)
    torch.testing.assert_close(layer.eval()(query, None)[0].double(), wanted, **close)


@pytest.mark.parametrize("away", FAR.values(), ids=FAR)
def test_running_statistics_far_from_zero_are_those_of_all_queries(away):
    layer, parts = QueryBatchNorm(2, 4).train(), [far_queries(away + shift) for shift in (0.0, 3.0, -1.0)]
    for part in parts:
        layer.update(layer(part, None)[1])
    layer.bfloat16()
    exact = torch.cat(parts).double()
    torch.testing.assert_close(layer.mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    # At 1e5 the mean's own rounding is 0.004 standard deviations.
    torch.testing.assert_close(layer.variance.double(), exact.var(0, correction=0), rtol=1e-7 * away, atol=0)


def test_an_averaged_batch_without_a_real_query_leaves_the_statistics_where_they_are():
    layer, query = QueryBatchNorm(2, 4).train(), far_queries(2.0)
    layer.update(layer(query, None)[1])
    before = state(layer)
    nothing = torch.zeros(len(query), dtype=torch.bool)
    layer.update(layer(query, nothing)[1])
    layer.update(layer(query[:0], None)[1])
    assert all(torch.equal(before[name], getattr(layer, name)) for name in ("mean", "variance", "square"))


def test_weights_of_earlier_versions_have_no_variance_and_evaluate_as_they_did():
    layer, query = QueryBatchNorm(2, 4).train(), far_queries(2.0)
    layer.update(layer(query, None)[1])
    old = {name: value for name, value in layer.state_dict().items() if name != "variance"}
    again = QueryBatchNorm(2, 4)
    again.load_state_dict(old)
    torch.testing.assert_close(again.eval()(query, None)[0], layer.eval()(query, None)[0], rtol=1e-4, atol=1e-5)
    # As transformers loads: what is missing is zero.
    layer.variance.zero_()
    layer.settle()
    assert torch.equal(layer.variance, again.variance)
