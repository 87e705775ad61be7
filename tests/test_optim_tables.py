"""The optimizer on layers that look up table rows, beside torch's AdamW on dense gradients."""

import pytest
import torch
from torch import nn

from lookups import (
    PEER,
    PKM,
    STILL,
    D,
    backward,
    each_layer,
    each_moment,
    inputs,
    layer_of,
    tables_of,
    torchs_adamw,
    trained,
)
from sparsemix.api import build_layer, build_optimizer
from sparsemix.layers import update
from sparsemix.optim import schedule

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("table_decay", [0.0, 0.3])
@each_layer
def test_with_catch_up_a_trajectory_is_that_of_torchs_adamw(config, table_decay, dtype, tolerance):
    ours, theirs = (layer_of(config | STILL).to(dtype) for _ in range(2))
    batches = [x.to(dtype) for x in inputs(40, T=3)]
    clipped = build_optimizer(ours, 0.02, catch_up=True, table_decay=table_decay)
    got = trained(ours, clipped, batches, clip=lambda p: clipped.clip_grad_norm_(p, 0.5))
    wanted = trained(
        theirs, torchs_adamw(theirs, 0.02, table_decay), batches, clip=lambda p: nn.utils.clip_grad_norm_(p, 0.5)
    )
    for name in wanted:
        close = {"rtol": tolerance, "atol": tolerance, "msg": lambda m, n=name: f"{n}: {m}"}
        torch.testing.assert_close(got[name], wanted[name], **close)
    # The control: without it, rows that miss steps end elsewhere.
    lazy = layer_of(config | STILL).to(dtype)
    other = trained(lazy, build_optimizer(lazy, 0.02, table_decay=table_decay), batches)
    assert max(float((other[name] - wanted[name]).abs().max()) for name in tables_of(lazy)) > 1e-3


def test_a_lazy_step_that_touches_every_row_is_the_dense_step():
    config = PEER | STILL | {"num_experts": 16, "num_heads": 8}
    ours, theirs = layer_of(config), layer_of(config)
    batches = inputs(12, T=40)
    got = trained(ours, build_optimizer(ours, 0.02), batches)
    wanted = trained(theirs, torchs_adamw(theirs, 0.02), batches)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@each_moment
@each_layer
def test_rows_that_nobody_looked_up_stay_and_so_do_their_moments(config, moment):
    layer = layer_of(config)
    optimizer = build_optimizer(layer, 0.1, table_moment=moment)
    trained(layer, optimizer, inputs(3))
    before = {name: p.detach().clone() for name, p in tables_of(layer).items()}
    slots = {name: {k: s.clone() for k, s in optimizer.state[p].items()} for name, p in tables_of(layer).items()}
    optimizer.zero_grad()
    backward(layer, inputs(1, T=2)[0])
    with torch.no_grad():
        picked = layer.train()(inputs(1, T=2)[0])[0]
    assert picked.isfinite().all()
    optimizer.step()
    for name, table in tables_of(layer).items():
        moved = (table != before[name]).any(dim=1)
        assert 0 < moved.sum() <= 2 * 2 * 2 * 4 < len(moved)
        for slot in ("exp_avg", "exp_avg_sq"):
            same = optimizer.state[table][slot] == slots[name][slot]
            assert (same if same.ndim == 1 else same.all(dim=1))[~moved].all()
        assert optimizer.state[table]["exp_avg_sq"].ndim == (2 if moment == "full" else 1)


@each_layer
def test_clipping_is_that_of_dense_gradients(config):
    ours, theirs = layer_of(config), layer_of(config)
    optimizer, x = build_optimizer(ours, 0.1, catch_up=True), inputs(1)[0]
    backward(ours, x), backward(theirs, x)
    norm = optimizer.clip_grad_norm_(ours.parameters(), 0.01)
    wanted = nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    assert float(wanted) > 0.02
    torch.testing.assert_close(norm, wanted, rtol=1e-5, atol=0)
    # A second look finds what the first left, scaled.
    torch.testing.assert_close(optimizer.clip_grad_norm_(ours.parameters(), 1.0), torch.tensor(0.01), rtol=1e-3, atol=0)
    assert float(optimizer.clip_grad_norm_([ours.sub_keys], 1.0)) < 0.01


def test_a_model_without_tables_is_clipped_by_torch_bit_for_bit():
    layers = [build_layer({"kind": "dense", "d_ff": 12}, D) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        backward(layer, inputs(1)[0])
    got = build_optimizer(layers[0], 0.1).clip_grad_norm_(layers[0].parameters(), 0.01)
    assert torch.equal(got, nn.utils.clip_grad_norm_(layers[1].parameters(), 0.01))
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("catch_up", [False, True])
@each_layer
def test_two_micro_batches_are_one_batch(config, catch_up):
    one, two = layer_of(config | STILL), layer_of(config | STILL)
    optimizers = [build_optimizer(layer, 0.1, catch_up=catch_up) for layer in (one, two)]
    for x in inputs(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(one, x)
        for half in x:
            backward(two, half[None], 0.5)
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_lazy_decay_is_made_up_for_when_a_row_is_reached_or_flushed():
    layer, lr, decay = layer_of(PKM), 0.5, 0.1
    optimizer, before = build_optimizer(layer, lr, table_decay=decay), layer.value_vectors.detach().clone()
    touched = torch.zeros(81, dtype=torch.bool)
    for step, x in enumerate(inputs(4, T=1)):
        optimizer.param_groups[-1]["lr"] = lr / (step + 1)
        optimizer.zero_grad()
        backward(layer, x)
        moments = optimizer.state[layer.value_vectors].get("exp_avg", torch.zeros_like(before)).clone()
        optimizer.step()
        touched |= (optimizer.state[layer.value_vectors]["exp_avg"] != moments).any(dim=1)
    assert touched.any() and not touched.all()
    assert torch.equal(layer.value_vectors[~touched], before[~touched])
    optimizer.flush()
    kept = 1.0
    for step in range(4):
        kept *= 1 - lr / (step + 1) * decay
    torch.testing.assert_close(layer.value_vectors[~touched], before[~touched] * kept)
    after = layer.value_vectors.detach().clone()
    optimizer.flush()
    assert torch.equal(layer.value_vectors, after)


@pytest.mark.parametrize("settings", [{}, {"table_moment": "row"}, {"catch_up": True}, {"table_decay": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_optimizer_goes_on_with_the_same_bits(settings, dtype, tmp_path):
    whole, half, batches = layer_of(PEER).to(dtype), layer_of(PEER).to(dtype), inputs(6)
    batches = [x.to(dtype) for x in batches]
    wanted = trained(whole, build_optimizer(whole, 0.02, **settings), batches)
    first = build_optimizer(half, 0.02, **settings)
    rates = [0.02 * schedule(step, 6, 3) for step in range(6)]

    def steps(layer, optimizer, some):
        for step in some:
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.zero_grad()
            aux = backward(layer, batches[step], 20.0)
            optimizer.step()
            update(layer, aux.stats)

    steps(half, first, range(3))
    torch.save((half.state_dict(), first.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt")
    other = layer_of(PEER, seed=7).to(dtype)
    other.load_state_dict(weights)
    second = build_optimizer(other, 0.5, **settings)
    second.load_state_dict(state)
    steps(other, second, range(3, 6))
    for name, p in other.named_parameters():
        assert torch.equal(p, wanted[name]), name
