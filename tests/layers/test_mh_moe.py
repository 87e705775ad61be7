import pytest
import torch
from cases import D, assert_is_its_loop, build, contexts, tokens

from sparsemix.config import ConfigError

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
