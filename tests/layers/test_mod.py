import itertools

import pytest
import torch
from cases import D, assert_is_its_loop, build, contexts, tokens
from loops import loop

from sparsemix.layers import Ctx, update

BLOCK = {"kind": "block", "mixer": {"kind": "attention", "num_heads": 5}, "ffn": {"kind": "dense", "d_ff": 3}}
BASE = {"kind": "mod", "capacity": 0.5, "predictor_width": 3, "inner": BLOCK}
GATES = ["sigmoid", "raw", "two_sigmoid", "one"]
MODES = {"training": False, "causal": True}
INNERS = {
    "dense": BLOCK["ffn"],
    "moe": {"kind": "moe", "num_experts": 5, "top_k": 2, "d_ff": 3},
    "peer": {"kind": "peer", "num_experts": 9, "num_heads": 2, "top_k": 3, "d_key": 4},
    "mh_moe": {"kind": "mh_moe", "num_heads": 2, "inner": {"kind": "moe", "num_experts": 3, "top_k": 1, "d_ff": 3}},
    "mod": BASE,
}


def observed(config, **kwargs):
    """A layer whose running state has seen a batch."""
    layer = build(config, **kwargs)
    update(layer, layer(tokens())[1].stats)
    return layer


@pytest.mark.parametrize("causal", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "all")], ids=["plain", "all"])
@pytest.mark.parametrize(
    ("gate", "block_output", "sampling"), [*itertools.product(GATES, ["delta", "full"], ["predictor", "threshold"])]
)
def test_mod_is_its_full_size_loop(gate, block_output, sampling, ctx, causal):
    layer = observed(BASE | {"gate": gate, "block_output": block_output, "sampling": sampling})
    assert_is_its_loop(layer, tokens(), ctx._replace(causal=causal))


@pytest.mark.parametrize("causal", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_mod_around_any_layer_is_its_full_size_loop(inner, causal):
    layer = observed(BASE | {"inner": inner})
    assert_is_its_loop(layer, tokens(), contexts()["all"]._replace(causal=causal))


@pytest.mark.parametrize("capacity", [0.01, 0.125, 1.0])
@pytest.mark.parametrize("sampling", ["predictor", "threshold"])
def test_mod_is_its_full_size_loop_at_every_capacity(sampling, capacity):
    layer = observed(BASE | {"capacity": capacity, "sampling": sampling})
    for causal in (False, True):
        assert_is_its_loop(layer, tokens(1, 23), Ctx(causal=causal))


def test_routed_tokens_keep_their_positions():
    layer, x = build(BASE), tokens(2, 23)
    layer.inner.register_forward_pre_hook(
        lambda module, args: (args[0], args[1]._replace(positions=torch.arange(12).expand(2, 12)))
    )
    assert (layer(x, Ctx())[0] - loop(layer, x, Ctx())[0]).abs().max() > 1e-3


def test_at_capacity_one_with_gate_one_it_is_the_wrapped_block():
    layer, x, ctx = build(BASE | {"capacity": 1.0, "gate": "one"}), tokens().requires_grad_(), contexts()["packed"]
    y, wanted = layer(x, ctx)[0], layer.inner(x, ctx)[0]
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    weights, moving = torch.randn_like(y), [x, *layer.inner.parameters()]
    mine, theirs = (torch.autograd.grad((out * weights).sum(), moving) for out in (y, wanted))
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", MODES.values(), ids=list(MODES))
def test_a_skipped_token_gets_no_update_and_the_block_no_gradient_from_it(causal):
    layer, x = build(BASE), tokens(2, 23).requires_grad_()
    y = layer(x, Ctx(causal=causal))[0]
    skipped = (y == 0).all(-1)
    assert 0 < int(skipped.sum()) < 46
    grads = torch.autograd.grad(y[skipped].sum(), [x, *layer.parameters()], retain_graph=True, materialize_grads=True)
    assert all(grad.abs().max() == 0 for grad in grads)
    assert torch.autograd.grad(y.square().sum(), x)[0][skipped].abs().max() == 0


@pytest.mark.parametrize("scores", ["random", "constant", "two_values"])
@pytest.mark.parametrize("capacity", [0.001, 0.1, 0.125, 0.3, 0.5, 0.9, 1.0])
def test_exactly_the_capacity_share_of_every_row_is_chosen_ties_to_the_earlier(capacity, scores):
    T, layer = 30, build(BASE | {"capacity": capacity, "inner": BLOCK["ffn"]})
    x = tokens(3, T)
    with torch.no_grad():
        layer.router.weight.zero_()[0, 0] = 1
    x[..., 0] = {"random": x[..., 0], "constant": torch.ones(3, T), "two_values": x[..., 0].sign()}[scores]
    chosen = layer(x, Ctx())[0].abs().sum(-1) > 0
    share = {0.001: 1, 0.1: 3, 0.125: 4, 0.3: 9, 0.5: 15, 0.9: 27, 1.0: 30}[capacity]
    assert chosen.sum(1).tolist() == [share] * 3
    for b in range(3):
        best = sorted(range(T), key=lambda t: (-float(x[b, t, 0]), t))[:share]
        assert chosen[b].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("capacity", [0.01, 0.125, 0.3, 0.5, 1.0])
def test_padding_is_never_chosen_and_shrinks_the_quota(capacity):
    counts = [0, 1, 5, 10, 16]
    valid = torch.zeros(5, 16, dtype=torch.bool)
    for b, n in enumerate(counts):
        valid[b, torch.randperm(16)[:n]] = True
    layer, x = build(BASE | {"capacity": capacity, "inner": BLOCK["ffn"]}), tokens(5, 16)
    chosen = layer(x, Ctx(valid=valid))[0].abs().sum(-1) > 0
    assert not (chosen & ~valid).any()
    shares = {
        0.01: [0, 1, 1, 1, 1],
        0.125: [0, 1, 1, 2, 2],
        0.3: [0, 1, 2, 3, 5],
        0.5: [0, 1, 3, 5, 8],
        1.0: counts,
    }
    assert chosen.sum(1).tolist() == shares[capacity]


def test_the_language_loss_gives_the_predictor_nothing_and_its_own_loss_gives_only_the_predictor_something():
    layer, x = build(BASE), tokens().requires_grad_()
    y, aux = layer(x, Ctx())
    predictor = dict(layer.predictor.named_parameters())
    grads = torch.autograd.grad(y.sum(), list(predictor.values()), retain_graph=True, materialize_grads=True)
    assert all(grad.abs().max() == 0 for grad in grads)
    moving = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(aux.losses["predictor"], list(moving.values()), materialize_grads=True)
    reached = {name for name, grad in zip(moving, grads, strict=True) if grad.abs().max() > 0}
    assert reached == {f"predictor.{name}" for name in predictor}


def test_the_router_learns_from_routed_tokens_only():
    layer, x = build(BASE | {"gate": "raw", "inner": BLOCK["ffn"]}), tokens(1, 7)
    weights = torch.randn_like(x)
    y = layer(x, Ctx())[0]
    (grad,) = torch.autograd.grad((y * weights).sum(), layer.router.weight)
    routed = [t for t in range(7) if float(y[0, t].detach().abs().sum()) > 0]
    assert len(routed) == 4
    fed = layer.inner(x)[0]
    wanted = sum((fed[0, t] @ weights[0, t]) * x[0, t] for t in routed)
    torch.testing.assert_close(grad[0], wanted, rtol=0, atol=1e-11)


def test_the_confusion_counts_predictor_against_top_k_over_real_tokens():
    layer, x, ctx = build(BASE), tokens(), contexts()["padded"]
    says = (layer.predictor(x) > 0) & ctx.valid
    took = layer(x, ctx._replace(causal=False))[0].abs().sum(-1) > 0
    cells = [says & took, says & ~took, ~says & took & ctx.valid, ~says & ~took & ctx.valid]
    confusion = layer(x, ctx._replace(causal=True))[1].stats["confusion"]
    assert confusion.tolist() == [int(cell.sum()) for cell in cells]


def test_a_training_step_says_how_far_the_causal_rule_agrees_with_the_top_k():
    layer = build(BASE)
    said = layer(tokens(2, 23), Ctx())[1].stats
    tp, fp, fn, tn = said["confusion"].tolist()
    assert tp + fn == 2 * 12 and fp > 0 < fn
    rates = [float(said[name]) for name in ("accuracy", "precision", "recall")]
    assert rates == pytest.approx([(tp + tn) / (2 * 23), tp / (tp + fp), tp / (tp + fn)])


def test_rows_without_a_routed_token_get_no_update_and_do_not_disturb_the_others():
    layer, x = build(BASE, train=False), tokens(3, 7)
    with torch.no_grad():
        layer.predictor.down.bias.fill_(-50)
        layer.predictor.up.weight.zero_()[0, 0] = 50
        layer.predictor.down.weight.zero_()[0, 0] = 50
    x[..., 0] = -1
    assert layer(x)[0].abs().max() == 0
    x[1, 2:5, 0] = 1
    y = layer(x)[0]
    assert (y.abs().sum(-1) > 0).nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]
    torch.testing.assert_close(layer(x[1:2])[0], y[1:2], rtol=0, atol=1e-12)


def test_a_full_block_output_also_gates_the_stream():
    x = tokens()
    delta, full = (build(BASE | {"block_output": output}) for output in ("delta", "full"))
    chosen = delta(x, Ctx())[0].abs().sum(-1, keepdim=True) > 0
    gate = torch.sigmoid(x @ delta.router.weight[0])[..., None]
    torch.testing.assert_close(full(x, Ctx())[0], delta(x, Ctx())[0] + gate * x * chosen, rtol=0, atol=1e-12)


def test_the_gate_is_a_single_row_of_weights():
    assert build(BASE).router.weight.shape == (1, D)
