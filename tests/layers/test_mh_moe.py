import pytest
import torch
from cases import D, assert_is_its_loop, build, contexts, tokens

from sparsemix.config import ConfigError
from sparsemix.layers import Ctx

INNER = {"kind": "moe", "num_experts": 5, "top_k": 2, "d_ff": 3, "z_weight": 0.1}
BASE = {"kind": "mh_moe", "num_heads": 5, "inner": INNER}


@pytest.mark.parametrize(
    "ctx", [contexts()[name] for name in ("plain", "padded", "all")], ids=["plain", "padded", "all"]
)
@pytest.mark.parametrize("inner_residual", [False, True], ids=["no_residual", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("num_heads", [1, 2, 5, 10])
def test_multi_head_moe_is_its_loop_over_sub_tokens(num_heads, bias, inner_residual, ctx):
    layer = build(BASE | {"num_heads": num_heads, "bias": bias, "inner_residual": inner_residual})
    assert_is_its_loop(layer, tokens(), ctx)


INNERS = {
    "dense": {"kind": "dense", "d_ff": 3},
    "peer": {"kind": "peer", "num_experts": 9, "num_heads": 2, "top_k": 3, "d_key": 4},
    "mod": {"kind": "mod", "capacity": 0.5, "predictor_width": 3, "inner": {"kind": "dense", "d_ff": 3}},
    "mh_moe": {"kind": "mh_moe", "num_heads": 1, "inner": INNER},
}


@pytest.mark.parametrize("ctx", [contexts()["padded"]], ids=["padded"])
@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_any_layer_works_on_sub_tokens(inner, ctx):
    assert_is_its_loop(build(BASE | {"inner": inner}), tokens(), ctx)


def test_multi_head_moe_is_its_loop_on_a_long_odd_sequence_with_an_idle_expert():
    layer, x = build(BASE | {"num_heads": 2, "bias": True}), tokens(1, 63)
    with torch.no_grad():
        # A bias puts 1 in the first channel of every sub-token, where one expert scores badly.
        layer.head.weight[[0, D // 2]] = 0
        layer.head.bias[[0, D // 2]] = 1
        layer.inner.router.weight[3, 0] = -20
    assert float(layer.eval()(x)[1].stats["inner.counts"][3]) == 0
    assert_is_its_loop(layer.train(), x, contexts()["plain"])


@pytest.mark.parametrize("precision", ["float", {"weights": "float", "sub_norm": True}], ids=["plain", "normed"])
@pytest.mark.parametrize("left", [(), ("head",), ("merge",)], ids=["none", "head", "merge"])
def test_head_and_merge_can_be_left_out(left, precision):
    settings = BASE | {"head": "head" in left, "merge": "merge" in left, "bias": True, "precision": precision}
    layer = build(settings)
    names = {name.partition(".")[0] for name, _ in layer.named_parameters()} - {"inner", "merge_norm"}
    assert names == set(left)
    assert_is_its_loop(layer, tokens(), contexts()["padded"])
    cost = layer.config.cost(D, 1)
    assert cost.params == sum(p.numel() for p in layer.parameters())
    assert cost.items["linear"] == 2 * D * D * len(left)


def test_without_head_and_merge_it_is_the_layer_whose_both_are_identities():
    full, bare = build(BASE), build(BASE | {"head": False, "merge": False})
    bare.inner.load_state_dict(full.inner.state_dict())
    with torch.no_grad():
        full.head.weight.copy_(torch.eye(D))
        full.merge.weight.copy_(torch.eye(D))
    x = tokens()
    torch.testing.assert_close(bare(x)[0], full(x)[0], rtol=0, atol=1e-12)


def test_one_head_with_identity_head_and_merge_is_the_inner_layer():
    layer, x = build(BASE | {"num_heads": 1}), tokens().requires_grad_()
    with torch.no_grad():
        layer.head.weight.copy_(torch.eye(D))
        layer.merge.weight.copy_(torch.eye(D))
    (y, aux), (wanted, inner_aux) = layer(x), layer.inner(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(aux.losses["inner.balance"], inner_aux.losses["balance"], rtol=0, atol=1e-12)
    weights, moving = torch.randn_like(y), [x, *layer.inner.parameters()]
    mine, theirs = (torch.autograd.grad((out * weights).sum(), moving) for out in (y, wanted))
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


INNER_IDS = ["gated", "relu", "peer"]


def test_one_head_with_an_orthogonal_merge_is_the_inner_layer_turned():
    layer, x = build(BASE | {"num_heads": 1}), tokens()
    with torch.no_grad():
        layer.head.weight.copy_(torch.eye(D))
        torch.nn.init.orthogonal_(layer.merge.weight)
    torch.testing.assert_close(layer(x)[0], layer.inner(x)[0] @ layer.merge.weight.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 12])
def test_every_divisor_of_the_width_splits_it(num_heads):
    layer = build(BASE | {"num_heads": num_heads}, 12)
    assert_is_its_loop(layer, tokens(1, 5, 12), Ctx())


@pytest.mark.parametrize("num_heads", [2, 5])
def test_permuting_tokens_permutes_updates_and_a_token_does_not_know_its_batch(num_heads):
    layer, x = build(BASE | {"num_heads": num_heads}), tokens(3, 7)
    order = torch.randperm(7)
    torch.testing.assert_close(layer(x[:, order])[0], layer(x)[0][:, order], rtol=0, atol=1e-12)
    for b, t in ((0, 0), (2, 4)):
        torch.testing.assert_close(layer(x[b : b + 1, t : t + 1])[0][0, 0], layer(x)[0][b, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "inner", [INNER, INNER | {"activation": "relu"}, INNERS["peer"]], ids=["gated", "relu", "peer"]
)
def test_a_shared_expert_sees_whole_tokens(inner):
    layer = build(BASE | {"inner": inner, "shared_d_ff": 4})
    assert_is_its_loop(layer, tokens(), contexts()["padded"])
    assert layer.shared.up.weight.shape == (4, D)
    assert layer.shared.activation == inner.get("activation", "gelu" if inner["kind"] == "peer" else "swiglu")


def test_equal_experts_and_normalized_gates_are_one_feed_forward_on_sub_tokens():
    layer, x = build(BASE | {"inner": INNER | {"top_k": 3, "normalize_gates": True}}), tokens()
    experts = layer.inner.experts
    with torch.no_grad():
        experts.gate_up.copy_(experts.gate_up[:1].expand_as(experts.gate_up))
        experts.down.copy_(experts.down[:1].expand_as(experts.down))
    parts = (x @ layer.head.weight.T).unflatten(-1, (5, 2))
    gate, up = (parts @ experts.gate_up[0].T).chunk(2, -1)
    fed = (torch.nn.functional.silu(gate) * up) @ experts.down[0].T
    torch.testing.assert_close(layer(x)[0], fed.flatten(-2) @ layer.merge.weight.T, rtol=0, atol=1e-11)


def test_two_passes_combine_in_the_same_order_bit_for_bit():
    layer, x = build(BASE | {"num_heads": 2}).float(), tokens(4, 63).float()
    results = []
    for _ in range(2):
        layer.zero_grad()
        y = layer(x)[0]
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("num_heads", [1, 2, 5, 10])
def test_sub_token_j_of_token_t_is_row_t_times_heads_plus_j(num_heads):
    layer, x = build(BASE | {"num_heads": num_heads}), tokens()
    seen = []
    layer.inner.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    layer(x)
    head, width = x @ layer.head.weight.T, D // num_heads
    for t in range(7):
        for j in range(num_heads):
            part = head[:, t, j * width : (j + 1) * width]
            torch.testing.assert_close(seen[0][:, t * num_heads + j], part, rtol=0, atol=1e-12)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match=r"^num_heads=3 must divide d_model=10; choose a divisor$"):
        build(BASE | {"num_heads": 3})
