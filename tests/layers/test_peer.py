import itertools

import pytest
import torch
from cases import assert_is_its_loop, build, contexts, tokens
from torch.nn import functional as F

from sparsemix.config import ConfigError
from sparsemix.layers import Ctx, update

BASE = {"kind": "peer", "num_experts": 9, "num_heads": 2, "top_k": 3, "d_key": 4}
CHOICES = list(
    itertools.product(
        ["softmax", "sigmoid", "relu"], ["gelu", "relu", "silu"], ["batch", "layer", "none"], [True, False]
    )
)


@pytest.mark.parametrize("ctx", [contexts()["padded"]], ids=["padded"])
@pytest.mark.parametrize(("gate", "activation", "query_norm", "share_keys"), CHOICES)
def test_peer_is_its_loop_over_tokens_and_all_experts(gate, activation, query_norm, share_keys, ctx):
    choice = {"gate": gate, "activation": activation, "query_norm": query_norm, "share_keys": share_keys}
    assert_is_its_loop(build(BASE | choice), tokens(), ctx)


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 1, "top_k": 1},
        {"top_k": 9},
        {"top_k": 1},
        {"num_heads": 1},
        {"num_experts": 64, "top_k": 7, "d_key": 2},
    ],
    ids=["one_expert", "every_expert", "top_1", "one_head", "64_experts"],
)
@pytest.mark.parametrize("ctx", [contexts()["padded"]], ids=["padded"])
def test_peer_is_its_loop_at_mean_sizes(change, ctx):
    assert_is_its_loop(build(BASE | change), tokens(), ctx)


def test_peer_is_its_loop_on_a_long_odd_sequence():
    assert_is_its_loop(build(BASE), tokens(1, 63), Ctx())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ctx", [contexts()["all"]], ids=["all"])
def test_evaluation_uses_running_statistics(ctx, causal):
    layer, x = build(BASE), tokens()
    update(layer, layer(x + 1)[1].stats)
    assert_is_its_loop(layer.eval(), x, ctx._replace(causal=causal))


def test_every_expert_with_zero_keys_is_the_dense_layer_scaled_by_heads_over_experts():
    h, N = 3, 9
    layer = build(BASE | {"num_heads": h, "top_k": N, "query_norm": "none"})
    with torch.no_grad():
        layer.sub_keys.zero_()
    x, dense = tokens().requires_grad_(), build({"kind": "dense", "d_ff": N, "activation": "gelu"})
    with torch.no_grad():
        dense.up.weight.copy_(layer.w_in)
        dense.down.weight.copy_(layer.w_out.T)
    y, wanted = layer(x)[0], dense(x)[0] * h / N
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-11)
    weights = torch.randn_like(y)
    mine = torch.autograd.grad((y * weights).sum(), [x, layer.w_in, layer.w_out])
    theirs = torch.autograd.grad((wanted * weights).sum(), [x, dense.up.weight, dense.down.weight])
    for got, want in zip(mine, (*theirs[:2], theirs[2].T), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_one_softmax_pick_gives_the_router_no_gradient():
    layer = build(BASE | {"top_k": 1, "query_norm": "layer"})
    layer(tokens())[0].square().sum().backward()
    for parameter in (layer.query.weight, layer.query.bias, layer.sub_keys, layer.query_norm.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0
    assert layer.w_in.grad is not None
    assert layer.w_in.grad.abs().max() > 0


def test_a_layer_of_many_heads_is_the_sum_of_its_heads():
    h, C = 3, BASE["d_key"]
    layer, x = build(BASE | {"num_heads": h}), tokens()
    total = torch.zeros_like(x)
    for i in range(h):
        one, mine = build(BASE | {"num_heads": 1}), slice(i * C, (i + 1) * C)
        with torch.no_grad():
            for name in ("sub_keys", "w_in", "w_out"):
                getattr(one, name).copy_(getattr(layer, name))
            one.query.weight.copy_(layer.query.weight[mine])
            one.query.bias.copy_(layer.query.bias[mine])
            one.query_norm.weight.copy_(layer.query_norm.weight[i : i + 1])
            one.query_norm.bias.copy_(layer.query_norm.bias[i : i + 1])
        total = total + one(x)[0]
    torch.testing.assert_close(layer(x)[0], total, rtol=0, atol=1e-11)


def test_shared_keys_are_keys_per_head_that_agree():
    layer, x = build(BASE), tokens()
    apart = build(BASE | {"share_keys": False})
    state = layer.state_dict()
    apart.load_state_dict(state | {"sub_keys": state["sub_keys"][None].expand(2, -1, -1, -1)})
    torch.testing.assert_close(apart(x)[0], layer(x)[0], rtol=0, atol=1e-12)


def test_relabelling_sub_keys_with_their_table_rows_changes_nothing():
    layer, x = build(BASE), tokens()
    wanted = layer(x)[0]
    left, right = torch.tensor([2, 0, 1]), torch.tensor([1, 0, 2])
    rows = (left[:, None] * 3 + right).flatten()
    with torch.no_grad():
        layer.sub_keys.copy_(torch.stack([layer.sub_keys[0, left], layer.sub_keys[1, right]]))
    assert (layer(x)[0] - wanted).abs().max() > 1e-3
    with torch.no_grad():
        layer.w_in.copy_(layer.w_in[rows])
        layer.w_out.copy_(layer.w_out[rows])
    torch.testing.assert_close(layer(x)[0], wanted, rtol=0, atol=1e-11)


def test_an_expert_id_is_left_times_n_plus_right():
    layer = build({"kind": "peer", "num_experts": 9, "num_heads": 1, "top_k": 1, "d_key": 2, "query_norm": "none"})
    with torch.no_grad():
        layer.query.weight.zero_()
        layer.query.bias.fill_(1)
        layer.sub_keys.copy_(torch.tensor([[[0.0], [0.0], [1.0]], [[0.0], [1.0], [0.0]]]))
    x = tokens()
    wanted = F.gelu(x @ layer.w_in[7])[..., None] * layer.w_out[7]
    torch.testing.assert_close(layer(x)[0], wanted, rtol=0, atol=1e-12)
    counts = layer.eval()(x)[1].stats["counts"]
    assert counts.nonzero().flatten().tolist() == [7]
    assert float(counts[7]) == 14


def test_the_pool_starts_with_the_output_variance_of_the_layer_it_replaces():
    x = torch.nn.functional.normalize(torch.randn(1, 400, 96).double(), dim=-1) * 96**0.5
    torch.manual_seed(1)
    peer = build({"kind": "peer", "num_experts": 4096, "num_heads": 8, "top_k": 16, "d_key": 32}, 96)
    dense = build({"kind": "dense", "d_ff": 256}, 96)
    for layer in (peer, dense):
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    spread = [float(layer(x)[0].detach().std()) for layer in (peer, dense)]
    # Heads that share experts and a softmax that is not quite uniform leave a factor of about 1.2.
    assert spread[0] == pytest.approx(spread[1], rel=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 10}, "num_experts=10 must be a square; the nearest are 9 and 16"),
        ({"top_k": 10}, r"top_k=10 must lie in \[1, num_experts=9\]"),
        ({"d_key": 5}, "d_key=5 must be even: its halves meet the two key sides"),
        ({"query_norm": "instance"}, "query_norm=instance input should be 'batch', 'layer' or 'none'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        build(BASE | change)
