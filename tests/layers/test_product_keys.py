"""What PEER and PKM share: symmetries of the look-up, gradients, determinism, running statistics."""

import pytest
import torch
from cases import PEER, PKM, build, contexts, tokens
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ranks import RANKS, on_ranks
from sparsemix.api import layer_cost
from sparsemix.config import parse
from sparsemix.layers import Ctx, LayerConfig, update

KINDS = {"peer": PEER, "pkm": PKM}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
shared_or_not = pytest.mark.parametrize("share_keys", [True, False], ids=["shared", "per_head"])


def tables(layer):
    return [p for name, p in layer.named_parameters() if name in ("w_in", "w_out", "value_vectors")]


def size_of(config):
    return "num_experts" if config["kind"] == "peer" else "num_values"


def gradients(layer, y, weights):
    return torch.autograd.grad((y * weights).sum(), list(layer.parameters()), materialize_grads=True)


def close(got, want, atol=1e-11):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@each_kind
@shared_or_not
def test_gradients_are_finite_differences_while_the_picks_stay(config, share_keys):
    layer, x = build(config | {"share_keys": share_keys}, 4), tokens(1, 5, 4).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x, Ctx()))[0]

    assert torch.autograd.gradcheck(output, (x, *(p.detach().requires_grad_() for p in layer.parameters())))


@each_kind
def test_softmax_gates_pull_the_sub_keys_of_a_side_apart_but_never_all_one_way(config):
    layer = build(config)
    layer(tokens())[0].square().sum().backward()
    assert layer.sub_keys.grad.abs().max() > 1e-3
    assert layer.sub_keys.grad.sum(dim=-2).abs().max() < 1e-11


def test_gates_that_do_not_compete_have_no_such_balance():
    layer = build(PEER | {"gate": "sigmoid"})
    layer(tokens())[0].square().sum().backward()
    assert layer.sub_keys.grad.sum(dim=-2).abs().max() > 1e-3


@each_kind
def test_a_row_that_nobody_picked_has_a_gradient_of_exactly_zero(config):
    layer, x = build(config | {size_of(config): 256}), tokens()
    layer(x)[0].square().sum().backward()
    update(layer, layer(x)[1].stats)
    counts = layer.eval()(x)[1].stats["counts"]
    assert 0 < (counts > 0).sum() < 256
    for table in tables(layer):
        assert table.grad[counts == 0].abs().max() == 0
        assert table.grad[counts > 0].abs().amax(1).min() > 0


@each_kind
def test_picks_of_the_same_row_by_many_heads_and_tokens_add_up(config):
    # One row in all: every head of every token picks it, with gate 1.
    layer, x = build(config | {size_of(config): 1, "top_k": 1, "num_heads": 5}), tokens()
    weights = torch.randn_like(x)
    grads = dict(zip(dict(layer.named_parameters()), gradients(layer, layer(x)[0], weights), strict=True))
    if config["kind"] == "pkm":
        return close(grads["value_vectors"][0], 5 * weights.sum((0, 1)))
    hidden = F.gelu(x @ layer.w_in[0])
    close(grads["w_out"][0], 5 * (hidden[..., None] * weights).sum((0, 1)))
    close(
        grads["w_in"][0], torch.autograd.grad((5 * hidden[..., None] * layer.w_out * weights).sum(), layer.w_in)[0][0]
    )


def test_gates_are_a_softmax_over_all_experts_renormalised_over_the_picked():
    layer, x = build(PEER), tokens()
    queries = layer.query_norm(layer.query(x.flatten(0, 1)).view(14, 2, 4), None)[0].view(14, 2, 2, 2)
    left, right = (torch.einsum("nhc,ic->nhi", queries[:, :, p], layer.sub_keys[p]) for p in (0, 1))
    everywhere = (left[..., :, None] + right[..., None, :]).flatten(2).softmax(-1)  # (N, H, experts)
    best, ids = everywhere.topk(3)
    gates = torch.zeros_like(everywhere).scatter(2, ids, best / best.sum(-1, keepdim=True))
    hidden = F.gelu(x.flatten(0, 1) @ layer.w_in.T)  # every expert
    close(layer(x)[0].flatten(0, 1), torch.einsum("nhe,ne,ed->nd", gates, hidden, layer.w_out))


@each_kind
def test_softmax_gates_sum_to_one_for_every_head_of_every_token(config):
    layer, x = build(config), tokens()
    update(layer, layer(x)[1].stats)
    stats = layer.eval()(x, contexts()["padded"])[1].stats
    real = int(contexts()["padded"].valid.sum())
    assert float(stats["gate_mass"].sum()) == pytest.approx(2 * real, abs=1e-9)
    assert float(stats["counts"].sum()) == 2 * 3 * real


def test_one_softmax_pick_a_head_is_a_feed_forward_of_the_picked_neurons():
    layer, x = build(PEER | {"top_k": 1, "num_heads": 3}), tokens(1, 1)
    update(layer, layer(tokens())[1].stats)
    y, aux = layer.eval()(x)
    ids = torch.repeat_interleave(torch.arange(9), aux.stats["counts"].long())
    assert len(ids) == 3
    close(y, F.gelu(x @ layer.w_in[ids].T) @ layer.w_out[ids])


@each_kind
@shared_or_not
def test_the_order_of_heads_changes_nothing(config, share_keys):
    layer, x = build(config | {"num_heads": 3, "share_keys": share_keys}), tokens()
    wanted, order = layer(x)[0], torch.tensor([2, 0, 1])
    with torch.no_grad():
        for parameter in (layer.query.weight, layer.query.bias):
            parameter.copy_(parameter.unflatten(0, (3, 4))[order].flatten(0, 1))
        for parameter in (layer.query_norm.weight, layer.query_norm.bias):
            parameter.copy_(parameter[order])
        if not share_keys:
            layer.sub_keys.copy_(layer.sub_keys[order])
    close(layer(x)[0], wanted)


@each_kind
@shared_or_not
def test_swapping_the_two_key_sides_transposes_the_table(config, share_keys):
    layer, x = build(config | {"share_keys": share_keys}), tokens()
    wanted = layer(x)[0]
    with torch.no_grad():
        for parameter in (layer.query.weight, layer.query.bias, layer.query_norm.weight, layer.query_norm.bias):
            halves = parameter.reshape(2, 2, 2, -1)  # (H, side, d_key / 2, ...)
            parameter.copy_(halves.flip(1).reshape(parameter.shape))
        layer.sub_keys.copy_(layer.sub_keys.flip(-3))
        assert (layer(x)[0] - wanted).abs().max() > 1e-3
        for table in tables(layer):
            table.copy_(table.unflatten(0, (3, 3)).transpose(0, 1).flatten(0, 1))
    close(layer(x)[0], wanted)


def test_peer_whose_neurons_all_answer_one_is_pkm():
    settings = {"num_heads": 2, "top_k": 3, "d_key": 4, "share_keys": True}
    pkm = build({"kind": "pkm", "num_values": 16, **settings})
    peer = build({"kind": "peer", "num_experts": 16, "activation": "relu", **settings})
    state = pkm.state_dict()
    state["w_out"], state["w_in"] = (
        state.pop("value_vectors"),
        F.one_hot(torch.zeros(16, dtype=torch.long), 10).double(),
    )
    peer.load_state_dict(state)
    x = tokens()
    x[..., 0] = 1
    close(peer(x)[0], pkm(x)[0])


@each_kind
@shared_or_not
def test_parameters_are_the_tables_the_query_network_its_norm_and_the_keys(config, share_keys):
    layer = build(config | {"share_keys": share_keys, "num_heads": 3, "d_key": 6})
    keys = 3 * 6 * (1 if share_keys else 3)
    query, norm = (10 + 1) * 3 * 6, 2 * 3 * 6
    assert sum(p.numel() for p in layer.parameters()) == len(tables(layer)) * 9 * 10 + query + norm + keys


def steps(config, threads):
    """Output and gradients of a training step, with tokens that share rows."""
    torch.manual_seed(0)
    layer, x = parse(LayerConfig, config).build(32), torch.randn(2, 300, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = layer(x)[0]
        return [y.detach(), *gradients(layer, y, torch.ones_like(y))]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@each_kind
def test_two_runs_are_equal_bit_for_bit(config, threads):
    settings = config | {size_of(config): 49, "num_heads": 4}
    for a, b in zip(steps(settings, threads), steps(settings, threads), strict=True):
        assert torch.equal(a, b)


@each_kind
def test_activation_checkpointing_observes_once_and_changes_no_gradient(config):
    layer, x = build(config), tokens().requires_grad_()
    before = {name: value.clone() for name, value in layer.named_buffers()}
    y, aux = layer(x)
    again, aux_again = checkpoint(layer, x, Ctx(), use_reentrant=False)
    close(again, y, 0)
    weights, moving = torch.randn_like(y), [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * weights).sum(), moving) for out in (y, again)]
    for plain, recomputed in zip(*grads, strict=True):
        close(recomputed, plain, 0)
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name]), "recomputing forward must move nothing"
    update(layer, aux_again.stats)
    assert int(layer.query_norm.num_updates) == 1
    for name in ("mean", "square"):
        close(getattr(layer.query_norm, name), aux.stats[f"query_norm.{name}"], 0)


STATEFUL = {**KINDS, "block": {"kind": "block", "mixer": PKM, "ffn": PEER}}


def observed(part):
    """Running statistics of every layer after two updates with its `part` of the tokens."""
    torch.manual_seed(7)
    steps, buffers = [tokens(2 * RANKS, 7) for _ in range(2)], {}
    for kind, config in STATEFUL.items():
        layer = build(config)
        for x in steps:
            update(layer, layer(x[part])[1].stats)
        buffers |= {f"{kind}.{name}": value.clone() for name, value in layer.named_buffers()}
    return buffers


def observed_by(rank):
    return observed(slice(2 * rank, 2 * rank + 2))


def test_statistics_of_data_parallel_ranks_are_those_of_one_process(tmp_path):
    ranks = on_ranks(observed_by, tmp_path)
    alone, control = observed(slice(None)), observed(slice(2))
    for name, value in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        if not name.startswith("block.ffn"):  # sees what each rank's own statistics made of its tokens
            close(ranks[0][name], value)
        if not name.endswith("num_updates"):
            assert (control[name] - value).abs().max() > 1e-3, "one rank alone must differ"


@each_kind
def test_a_look_up_costs_its_query_network_and_all_sub_keys(config):
    settings = config | {size_of(config): 49, "num_heads": 3, "d_key": 6}
    cost, rows = layer_cost(settings, 10, 1), 2 if config["kind"] == "peer" else 1
    assert cost.items == {"router": 2 * 10 * 3 * 6 + 2 * 3 * 7 * 6, "experts": 2 * rows * 3 * 3 * 10}
