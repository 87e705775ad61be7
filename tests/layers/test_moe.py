import pytest
import torch
from cases import assert_is_its_loop, build, contexts, tokens
from torch.nn import functional as F

from sparsemix.config import ConfigError, parse
from sparsemix.layers import Ctx, LayerConfig, update

BASE = {"kind": "moe", "num_experts": 5, "top_k": 2, "d_ff": 3}
SETTINGS = {
    "top_1": {"top_k": 1},
    "top_2": {},
    "every_expert": {"top_k": 5},
    "one_expert": {"num_experts": 1, "top_k": 1},
    "normalized": {"normalize_gates": True},
    "shared_expert": {"shared_d_ff": 4},
    "first_picks": {"balance_picks": "first", "balance_weight": 1.0},
    "half_capacity": {"capacity_factor": 0.5},
    "capacity_of_one": {"capacity_factor": 0.01, "top_k": 3},
    "capacity_of_top_1": {"capacity_factor": 0.7, "top_k": 1, "normalize_gates": True},
    "capacity_with_everything": {
        "capacity_factor": 0.8,
        "top_k": 3,
        "normalize_gates": True,
        "shared_d_ff": 4,
        "balance_picks": "first",
    },
    "every_expert_at_capacity": {"top_k": 5, "capacity_factor": 0.4},
    "one_expert_at_capacity": {"num_experts": 1, "top_k": 1, "capacity_factor": 0.4},
    "bias": {"bias_rate": 0.3, "normalize_gates": True},
    "bias_at_capacity": {"bias_rate": 0.3, "capacity_factor": 0.6},
    "both_losses": {"balance_weight": 0.7, "z_weight": 0.3},
    "no_loss": {"balance_weight": 0.0},
    "geglu": {"activation": "geglu"},
    "relu": {"activation": "relu", "shared_d_ff": 4},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": "silu"},
}


@pytest.mark.parametrize(
    "ctx", [contexts()[name] for name in ("plain", "padded", "all")], ids=["plain", "padded", "all"]
)
@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_moe_is_its_loop_over_tokens(change, ctx):
    layer = build(BASE | {"z_weight": 0.1} | change)
    update(layer, layer(tokens(1, 23))[1].stats)
    assert (layer.bias is not None and layer.bias.abs().max() > 0) == ("bias_rate" in change)
    for causal in (False, True):
        assert_is_its_loop(layer, tokens(), ctx._replace(causal=causal))


@pytest.mark.parametrize("favour", [100.0, -100.0], ids=["all_on_one_expert", "one_expert_without_tokens"])
@pytest.mark.parametrize("ctx", [contexts(2, 63)[name] for name in ("plain", "all")], ids=["plain", "all"])
@pytest.mark.parametrize("capacity_factor", [None, 0.02, 1.0, 2.0])
def test_moe_is_its_loop_when_the_load_is_extreme(favour, ctx, capacity_factor):
    layer, x = build(BASE | {"top_k": 1, "capacity_factor": capacity_factor}), tokens(2, 63)
    x[..., 0] = 1.0
    with torch.no_grad():
        layer.router.weight[3, 0] = favour
        # An overwhelming score saturates the softmax in the loop's plain exponentials; 30 is enough.
        layer.router.weight.clamp_(-30, 30)
    picks = layer.eval()(x, Ctx())[1].stats["counts"]
    assert float(picks[3]) == (126 if favour > 0 else 0)
    assert_is_its_loop(layer.train(), x, ctx)


def test_one_expert_is_the_dense_layer():
    layer, x = build({"kind": "moe", "num_experts": 1, "top_k": 1, "d_ff": 7}), tokens().requires_grad_()
    dense = build({"kind": "dense", "d_ff": 7})
    gate_up = torch.cat([dense.gate.weight, dense.up.weight])[None]
    with torch.no_grad():
        layer.experts.gate_up.copy_(gate_up)
        layer.experts.down.copy_(dense.down.weight[None])
    y, wanted = layer(x)[0], dense(x)[0]
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-11)
    weights = torch.randn_like(y)
    mine = torch.autograd.grad((y * weights).sum(), [x, layer.experts.gate_up, layer.experts.down, layer.router.weight])
    theirs = torch.autograd.grad((wanted * weights).sum(), [x, dense.gate.weight, dense.up.weight, dense.down.weight])
    torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(mine[1][0], torch.cat(theirs[1:3]), rtol=0, atol=1e-11)
    torch.testing.assert_close(mine[2][0], theirs[3], rtol=0, atol=1e-11)
    assert mine[3].abs().max() < 1e-14


def test_a_shared_expert_adds_a_dense_layer():
    layer, x = build(BASE | {"shared_d_ff": 4}), tokens()
    shared, layer.shared = layer.shared, None
    without = layer(x)[0]
    layer.shared = shared
    torch.testing.assert_close(layer(x)[0], without + shared(x)[0], rtol=0, atol=1e-12)


def test_equal_experts_and_normalized_gates_are_one_dense_layer():
    layer, x = build(BASE | {"top_k": 3, "normalize_gates": True}), tokens()
    with torch.no_grad():
        layer.experts.gate_up.copy_(layer.experts.gate_up[:1].expand_as(layer.experts.gate_up))
        layer.experts.down.copy_(layer.experts.down[:1].expand_as(layer.experts.down))
    gate, up = (x @ layer.experts.gate_up[0].T).chunk(2, -1)
    torch.testing.assert_close(layer(x)[0], (F.silu(gate) * up) @ layer.experts.down[0].T, rtol=0, atol=1e-11)


def test_counts_are_picks_of_real_tokens_and_gate_mass_sums_their_gates():
    layer, x, ctx = build(BASE | {"normalize_gates": True}, train=False), tokens(), contexts()["padded"]
    stats = layer(x, ctx)[1].stats
    assert float(stats["counts"].sum()) == 2 * int(ctx.valid.sum())
    assert float(stats["gate_mass"].sum()) == pytest.approx(int(ctx.valid.sum()), abs=1e-9)


def test_more_picks_than_experts_are_refused():
    with pytest.raises(ConfigError, match=r"^top_k=9 must lie in \[1, num_experts=5\]$"):
        build(BASE | {"top_k": 9})


def test_tokens_in_another_order_get_their_own_updates_and_only_capacity_knows_the_order():
    x, order = tokens(2, 23), torch.randperm(23)
    for capacity_factor, same in ((None, True), (0.5, False)):
        layer = build(BASE | {"capacity_factor": capacity_factor})
        y, moved = layer(x, Ctx())[0], layer(x[:, order], Ctx())[0]
        assert torch.allclose(moved, y[:, order], rtol=0, atol=1e-12) == same


# Capacity. One-hot tokens whose router scores are given, so that who asks for what is known.


def asking(choices, capacity_factor, E=3, scale=(2.0, 1.0), **settings):
    """A layer, and a row of tokens with the given choices, best first; every expert adds 1 for each unit of gate."""
    top_k = len(choices[0])
    raw = {"num_experts": E, "top_k": top_k, "d_ff": 1, "activation": "relu", "capacity_factor": capacity_factor}
    layer = build({"kind": "moe", **raw, **settings}, d_model=len(choices))
    with torch.no_grad():
        layer.router.weight.fill_(-2.0)
        for t, ids in enumerate(choices):
            for k, e in enumerate(ids):
                layer.router.weight[e, t] = scale[k]
    return layer, torch.eye(len(choices), dtype=torch.float64)[None]


def served(layer, x, ctx=None):
    """Experts that ran on each token, told by the gradient of the token's update towards each expert's output."""
    y = layer(x, ctx or Ctx())[0]
    ran = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            (grad,) = torch.autograd.grad(y[b, t].sum(), layer.experts.down, retain_graph=True)
            ran.append((b, t, (grad.abs().sum((1, 2)) > 0).nonzero().flatten().tolist()))
    return [experts for _, _, experts in ran]


def positive(layer):
    """Every expert's inner activation positive, so that a served token always leaves a gradient."""
    with torch.no_grad():
        layer.experts.up.fill_(1.0)
        layer.experts.down.fill_(1.0)
    return layer


def test_first_choices_are_seated_before_second_ones_and_each_by_position():
    # Six tokens, three experts, two picks: 0.5 * 2 * 6 / 3 = 2 seats each.
    choices = [(0, 1), (1, 0), (0, 2), (0, 1), (2, 0), (1, 2)]
    layer, x = asking(choices, 0.5)
    # Expert 0: first choices of 0, 2 (3 is dropped). Expert 1: 1, 5. Expert 2: 4, then the second choice of 2.
    assert served(positive(layer), x) == [[0], [1], [0, 2], [], [2], [1]]


def test_dropped_picks_are_counted_and_add_nothing():
    choices = [(0, 1), (1, 0), (0, 2), (0, 1), (2, 0), (1, 2)]
    layer, x = asking(choices, 0.5)
    y, aux = layer(x, Ctx())
    assert float(aux.stats["dropped"]) == pytest.approx(6 / 12)
    assert aux.stats["counts"].tolist() == [5, 4, 3]
    assert y[0, 3].abs().max() == 0
    assert "dropped" not in layer.eval()(x)[1].stats


def test_only_real_tokens_take_seats_and_shrink_the_capacity():
    choices = [(0, 1), (0, 1), (0, 2), (0, 1), (2, 0), (1, 2)]
    layer, x = asking(choices, 0.5)
    valid = torch.tensor([[False, True, True, True, False, False]])
    # Three real tokens: one seat each. Expert 0 seats token 1, expert 1 the second choice of 1, expert 2 that of 2.
    ran = served(positive(layer), x, Ctx(valid=valid))
    assert [ran[t] for t in (1, 2, 3)] == [[0, 1], [2], []]
    assert float(layer(x, Ctx(valid=valid))[1].stats["dropped"]) == pytest.approx(3 / 6)
    nobody = layer(x, Ctx(valid=torch.zeros_like(valid)))[1].stats
    assert float(nobody["dropped"]) == 0 and nobody["counts"].sum() == 0


def test_rows_do_not_compete_for_seats():
    layer = build(BASE | {"capacity_factor": 0.5})
    x = tokens(4, 7)
    apart = torch.cat([layer(row[None], Ctx())[0] for row in x])
    torch.testing.assert_close(layer(x, Ctx())[0], apart, rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_with_a_seat_for_everybody_capacity_changes_nothing(top_k):
    x, config = tokens(2, 23), BASE | {"top_k": top_k}
    dropless, roomy = build(config), build(config | {"capacity_factor": 5 / top_k})
    (y, aux), (wanted, _) = roomy(x, Ctx()), dropless(x, Ctx())
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    assert float(aux.stats["dropped"]) == 0
    assert not roomy.config.looks_ahead


def test_the_causal_rule_drops_nothing():
    x = tokens(2, 23)
    tight, dropless = (build(BASE | {"capacity_factor": factor}, train=False) for factor in (0.3, None))
    torch.testing.assert_close(tight(x)[0], dropless(x)[0], rtol=0, atol=1e-12)
    assert (tight(x, Ctx())[0] - dropless(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "ahead"),
    [
        ({}, False),
        ({"capacity_factor": 1.0}, True),
        ({"capacity_factor": 1.0, "top_k": 1}, False),
        ({"capacity_factor": 2.5}, False),
    ],
)
def test_capacity_looks_ahead_where_a_later_first_choice_takes_an_earlier_ones_second_seat(changes, ahead):
    assert parse(LayerConfig, BASE | changes).looks_ahead == ahead


# The bias of auxiliary-loss-free balancing.


def test_the_bias_rises_by_the_rate_where_load_is_low_and_falls_where_it_is_high():
    choices = [(0,), (0,), (0,), (1,), (1,), (2,)]
    layer, x = asking(choices, None, bias_rate=0.25, balance_weight=0.0)
    for steps in (1, 2):
        # Gates are 0.96 against 0.02: one step of 0.25 turns no pick, two do.
        stats = layer(x, Ctx())[1].stats
        assert stats["load"].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6])
        update(layer, stats)
        assert layer.bias.tolist() == [-0.25 * steps, 0.0, 0.25 * steps]
    assert layer(x, Ctx())[1].stats["load"].tolist() == pytest.approx([0, 1 / 3, 2 / 3])


def test_the_bias_moves_in_update_alone_and_never_by_an_evaluation():
    layer, x = build(BASE | {"bias_rate": 0.1}), tokens()
    stats = [layer(x, Ctx())[1].stats for _ in range(3)]
    assert layer.bias.abs().max() == 0
    update(layer, {name: sum(s[name] for s in stats) / 3 for name in stats[0]})
    assert set(layer.bias.abs().tolist()) <= {0.0, 0.1} and layer.bias.abs().max() > 0
    before = layer.bias.clone()
    update(layer.eval(), layer(x)[1].stats)
    assert torch.equal(layer.bias, before)


def test_a_layer_forgets_no_bias():
    layer = build(BASE | {"bias_rate": 0.1})
    update(layer, layer(tokens(), Ctx())[1].stats)
    before = layer.bias.clone()
    layer.forget()
    assert torch.equal(layer.bias, before)


def test_there_is_no_bias_without_a_rate():
    assert not dict(build(BASE).named_buffers())
    assert set(dict(build(BASE | {"bias_rate": 0.1}).named_buffers())) == {"bias"}


def test_the_bias_evens_out_a_skewed_router():
    layer, x = build(BASE | {"bias_rate": 0.01, "balance_weight": 0.0}), tokens(4, 63)
    x[..., 0] = 1.0
    with torch.no_grad():
        layer.router.weight[:, 0] += torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
        before = float(layer(x, Ctx())[1].stats["max_load"])
        for _ in range(100):
            update(layer, layer(x, Ctx())[1].stats)
        after = float(layer(x, Ctx())[1].stats["max_load"])
    assert before > 0.45 and after < 0.3
