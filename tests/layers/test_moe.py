import pytest
import torch
from cases import D, assert_is_its_loop, build, contexts, tokens
from torch.nn import functional as F

from sparsemix.config import ConfigError
from sparsemix.layers import Ctx

BASE = {"kind": "moe", "num_experts": 5, "top_k": 2, "d_ff": 3}
SETTINGS = {
    "top_1": {"top_k": 1},
    "top_2": {},
    "every_expert": {"top_k": 5},
    "one_expert": {"num_experts": 1, "top_k": 1},
    "normalized": {"normalize_gates": True},
    "shared_expert": {"shared_d_ff": 4},
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
    assert_is_its_loop(build(BASE | {"z_weight": 0.1} | change), tokens(), ctx)


@pytest.mark.parametrize("favour", [100.0, -100.0], ids=["all_on_one_expert", "one_expert_without_tokens"])
@pytest.mark.parametrize("ctx", [contexts(2, 63)[name] for name in ("plain", "all")], ids=["plain", "all"])
def test_moe_is_its_loop_when_the_load_is_extreme(favour, ctx):
    layer, x = build(BASE | {"top_k": 1}), tokens(2, 63)
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


def test_even_routing_has_balance_loss_one_and_collapse_has_its_maximum():
    layer = build({"kind": "moe", "num_experts": D, "top_k": 1, "d_ff": 3, "balance_weight": 1.0})
    x = torch.eye(D, dtype=torch.float64)[None]
    with torch.no_grad():
        layer.router.weight.copy_(5 * torch.eye(D))
    assert float(layer(x)[1].losses["balance"].detach()) == pytest.approx(1, abs=1e-12)
    everyone_to_3 = x[:, 3:4].expand(1, 7, D)
    collapsed = float(layer(everyone_to_3)[1].losses["balance"].detach())
    assert collapsed == pytest.approx(D * float(F.softmax(5 * x[0, 3], 0)[3]), abs=1e-11)


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
