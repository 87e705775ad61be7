"""Whose the gradients of looked-up tables are, and that torch's own tools see them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lookups import PEER, backward, each_layer, inputs, layer_of, tables_of, torchs_adamw
from sparsemix.api import build_optimizer
from sparsemix.layers import update
from sparsemix.ops.row_grad.factored import FactoredGrad, lent_table


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_a_file,
}


def trained_by_torch(layer, steps=3):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    for x in inputs(steps):
        optimizer.zero_grad()
        aux = backward(layer, x)
        optimizer.step()
        update(layer, aux.stats)
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@each_layer
def test_a_copy_of_a_layer_trains_under_another_optimizer_as_one_that_never_had_ours(config, copied):
    wanted = trained_by_torch(layer_of(config))
    layer = layer_of(config)
    ours = build_optimizer(layer, 0.1)
    backward(layer, inputs(1)[0])
    ours.zero_grad()
    twin = copied(layer)
    assert layer.row_grads and not twin.row_grads and twin.tables_owner is None
    for name, got in trained_by_torch(twin).items():
        assert torch.equal(got, wanted[name]), name


def test_a_copy_of_a_model_and_its_optimizer_goes_on_as_they_do():
    layer, x = layer_of(PEER), inputs(1)[0]
    optimizer = build_optimizer(layer, 0.1, betas=(0.8, 0.9))
    both = (layer, optimizer)
    backward(layer, x)
    optimizer.step()
    for copied in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert copied[0].tables_owner() is copied[1]
        other = copy.deepcopy(both)
        for pair in (other, copied):
            pair[1].zero_grad()
            backward(pair[0], x)
            assert type(pair[0].w_in.grad) is FactoredGrad
            pair[1].step()
        for got, want in zip(copied[0].parameters(), other[0].parameters(), strict=True):
            assert torch.equal(got, want)
    optimizer.zero_grad()
    backward(layer, x)
    optimizer.step()
    for got, want in zip(other[0].parameters(), layer.parameters(), strict=True):
        assert torch.equal(got, want)


@each_layer
def test_the_loan_of_the_tables_ends_with_the_optimizer(config):
    layer, x = layer_of(config), inputs(1)[0]
    optimizer = build_optimizer(layer, 0.1)
    second = build_optimizer(layer, 0.1)
    del optimizer
    backward(layer, x)
    assert all(type(table.grad) is FactoredGrad for table in tables_of(layer).values()), "the second one lives"
    second.step()
    del second
    layer.zero_grad()
    assert not layer.row_grads
    backward(layer, x)
    assert all(type(table.grad) is torch.Tensor for table in tables_of(layer).values())
    assert all(lent_table(table) is None for table in tables_of(layer).values())


def test_a_graph_that_outlives_the_optimizer_has_dense_gradients():
    layer, x = layer_of(PEER), inputs(1)[0]
    optimizer = build_optimizer(layer, 0.1)
    loss = layer(x)[0].square().mean()
    del optimizer
    loss.backward()
    assert type(layer.w_in.grad) is torch.Tensor


def test_another_optimizer_beside_ours_trains_the_tables_and_is_told_of_release():
    wanted, layer = trained_by_torch(layer_of(PEER)), layer_of(PEER)
    ours = build_optimizer(layer, 0.1)
    with pytest.warns(UserWarning, match=r"forms the whole gradient of a looked-up table.*optimizer.release\(\)"):
        got = trained_by_torch(layer)
    assert layer.tables_owner() is ours
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)


def pair_of(config):
    """The same layer with factored and with dense gradients of two micro-batches, larger than the clip."""
    layers = layer_of(config), layer_of(config)
    owner = build_optimizer(layers[0], 0.1)
    for layer in layers:
        for x in inputs(2):
            backward(layer, x, 50.0)
    return *layers, owner


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@each_layer
def test_torchs_clip_sees_the_tables(config, max_norm):
    ours, theirs, _owner = pair_of(config)
    norm, wanted = (nn.utils.clip_grad_norm_(layer.parameters(), max_norm) for layer in (ours, theirs))
    torch.testing.assert_close(norm, wanted)
    # The control: what it would be without the tables.
    assert nn.utils.get_total_norm([p.grad for p in ours.parameters() if type(p.grad) is torch.Tensor]) < 0.9 * wanted
    for name, table in tables_of(ours).items():
        assert type(table.grad) is FactoredGrad
        torch.testing.assert_close(table.grad.whole(), theirs.get_parameter(name).grad)


def test_a_gradient_scaler_unscales_the_tables():
    ours, theirs, owner = pair_of(PEER)
    before = theirs.w_in.grad.clone()
    for layer, optimizer in ((ours, owner), (theirs, torch.optim.SGD(theirs.parameters()))):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        if layer is ours:
            with pytest.warns(UserWarning, match="forms the whole gradient"):
                scaler.unscale_(optimizer)
        else:
            scaler.unscale_(optimizer)
    torch.testing.assert_close(theirs.w_in.grad, before / 8)
    torch.testing.assert_close(ours.w_in.grad.whole(), theirs.w_in.grad)


def test_torchs_functions_of_a_factored_gradient_are_those_of_the_dense_one():
    ours, theirs, _owner = pair_of(PEER)
    got, want = ours.w_in.grad, theirs.w_in.grad
    torch.testing.assert_close(got.norm(), want.norm())
    twin = got.clone()
    twin.mul_(2)
    torch.testing.assert_close(twin.whole(), 2 * want)
    torch.testing.assert_close((got + want).whole(), 2 * want)
    with pytest.warns(UserWarning, match="forms the whole gradient"):
        torch.testing.assert_close(got.abs().max(), want.abs().max())
        got.clamp_(max=0)
    torch.testing.assert_close(got.whole(), want.clamp(max=0))
    got.zero_()
    assert float(got.norm()) == 0 and not got.whole().any()


@pytest.mark.parametrize("forget", [lambda layer: layer.zero_grad(), lambda layer: layer.zero_grad(False)])
def test_a_models_own_zero_grad_forgets_the_tables_gradients(forget):
    layer, x = layer_of(PEER), inputs(1)[0]
    optimizer, before = build_optimizer(layer, 0.1), layer.w_in.detach().clone()
    backward(layer, x)
    forget(layer)
    optimizer.step()
    assert torch.equal(layer.w_in, before)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@each_layer
def test_gradients_of_other_things_leave_the_tables_alone(config, recompute):
    layer, x = layer_of(config), inputs(1)[0].requires_grad_()
    owner = build_optimizer(layer, 0.1)

    def loss():
        y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False) if recompute else layer(x)[0]
        return y.square().mean()

    torch.autograd.grad(loss(), x)
    loss().backward(inputs=[x])
    assert all(table.grad is None for table in tables_of(layer).values())
    loss().backward()
    assert all(type(table.grad) is FactoredGrad for table in tables_of(layer).values())
    if not recompute:
        tables = list(tables_of(layer).values())
        asked = torch.autograd.grad(loss(), tables)
        for table, grad in zip(tables, asked, strict=True):
            torch.testing.assert_close(grad, table.grad.whole())
    assert layer.tables_owner() is owner


@pytest.mark.parametrize("stands_for", [lambda p: p.detach(), lambda p: p.detach().clone(), lambda p: 1.0 * p])
def test_tensors_that_stand_in_for_the_tables_have_their_own_gradients(stands_for):
    layer, x = layer_of(PEER), inputs(1)[0]
    owner = build_optimizer(layer, 0.1)
    given = {name: stands_for(p) for name, p in layer.named_parameters()}
    for value in given.values():
        value.requires_grad_()
        value.retain_grad()
    torch.func.functional_call(layer, given, (x,))[0].square().mean().backward()
    assert type(given["w_in"].grad) is torch.Tensor and given["w_in"].grad.any()
    assert type(layer.w_in.grad) is not FactoredGrad
    assert layer.tables_owner() is owner


def test_a_penalty_on_a_table_adds_to_its_looked_up_gradient_in_either_order():
    totals = []
    for penalty_first in (True, False, None):
        layer, x = layer_of(PEER), inputs(1)[0]
        owner = torchs_adamw(layer, 0.1) if penalty_first is None else build_optimizer(layer, 0.1)
        if penalty_first:
            layer.w_in.square().sum().backward()
        backward(layer, x)
        if not penalty_first:
            layer.w_in.square().sum().backward()
        totals.append(layer.w_in.grad if penalty_first is None else layer.w_in.grad.whole())
        del owner
    for total in totals[:2]:
        torch.testing.assert_close(total, totals[2])


def unscaled(layer, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


@pytest.mark.filterwarnings("ignore:.*forms the whole gradient")
@pytest.mark.parametrize(
    "whole",
    [
        unscaled,
        lambda layer, _: nn.utils.clip_grad_norm_(layer.parameters(), 1e9, float("inf")),
        lambda layer, _: nn.utils.clip_grad_norm_(layer.parameters(), 1e9, foreach=True),
        lambda layer, _: nn.utils.clip_grad_value_(layer.parameters(), 1e9),
    ],
    ids=["scaler", "norm inf", "foreach", "value"],
)
def test_a_tool_that_forms_whole_gradients_gives_no_row_one_that_nobody_picked(whole):
    stepped = []
    for tool in (lambda *_: None, whole):
        layer = layer_of(PEER | {"query_norm": "layer"})
        optimizer = build_optimizer(layer, 0.1)
        for x in inputs(3):
            # One token of each: most rows are not picked again, and have momentum.
            backward(layer, x[:1, :1])
            tool(layer, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        stepped.append(layer)
    torch.testing.assert_close(tables_of(stepped[1]), tables_of(stepped[0]), rtol=1e-3, atol=1e-4)
