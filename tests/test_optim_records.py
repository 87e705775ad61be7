"""What becomes of the gradients that look-ups leave for the optimizer."""

import pytest
import torch
from memory import allocated

from lookups import (
    PEER,
    backward,
    inputs,
    layer_of,
    torchs_adamw,
)
from sparsemix.api import build_layer, build_model, build_optimizer
from sparsemix.errors import ConfigError
from sparsemix.ops.row_grad.factored import FactoredGrad


def test_learning_rate_schedulers_of_torch_move_tables_too():
    layer = layer_of(PEER)
    optimizer = build_optimizer(layer, 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    backward(layer, inputs(1)[0])
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 3


def test_a_table_without_a_gradient_is_not_stepped():
    layer = layer_of(PEER)
    optimizer, before = build_optimizer(layer, 0.1, table_decay=0.1, catch_up=True), layer.w_in.detach().clone()
    optimizer.step()
    assert torch.equal(layer.w_in, before) and not optimizer.state[layer.w_in]


def test_zero_grad_forgets_what_was_recorded_and_gathered():
    layer = layer_of(PEER)
    optimizer, before = build_optimizer(layer, 0.1), layer.w_in.detach().clone()
    for gathers in (False, True):
        backward(layer, inputs(1)[0])
        if gathers:
            optimizer.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.zero_grad()
        assert layer.w_in.grad is None
        optimizer.step()
        assert torch.equal(layer.w_in, before)


def test_a_dense_gradient_of_a_table_is_added_to_its_rows():
    ours, theirs = layer_of(PEER), layer_of(PEER)
    optimizers = [build_optimizer(ours, 0.1), torchs_adamw(theirs, 0.1)]
    for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
        layer.w_in.square().sum().backward()
        backward(layer, inputs(1)[0])
        optimizer.step()
    torch.testing.assert_close(ours.w_in, theirs.w_in, rtol=1e-4, atol=1e-5)


def test_another_optimizer_trains_the_tables_after_release():
    layer, x = layer_of(PEER), inputs(1)[0]
    optimizer = build_optimizer(layer, 0.1)
    backward(layer, x)
    assert type(layer.w_in.grad) is FactoredGrad
    optimizer.release()
    backward(layer, x)
    assert type(layer.w_in.grad) is torch.Tensor


def test_frozen_tables_are_left_alone():
    layer = layer_of(PEER)
    layer.w_in.requires_grad_(False)
    optimizer, before = build_optimizer(layer, 0.1), layer.w_in.detach().clone()
    backward(layer, inputs(1)[0])
    optimizer.step()
    assert torch.equal(layer.w_in, before) and optimizer.state[layer.w_out]


@pytest.mark.parametrize(("name", "value"), [("table_moment", "rows"), ("matrices", "sgd")])
def test_an_unknown_choice_is_a_one_line_error(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}={value} is none of \w+, \w+$"):
        build_optimizer(layer_of(PEER), 0.1, **{name: value})


def test_a_step_forms_no_gradient_of_a_table_and_no_vectors_of_picks():
    config = {"kind": "peer", "num_experts": 128**2, "num_heads": 4, "top_k": 16, "d_key": 8}
    layer, x = build_layer(config, 64).train(), torch.randn(1, 256, 64)
    optimizer = build_optimizer(layer, 0.1)

    def step():
        layer(x)[0].square().mean().backward()
        optimizer.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()

    step()
    picks, table = 4 * 256 * 64 * 64, layer.w_in.numel() * 4
    assert table == picks == 4 * 2**20
    assert allocated(step).largest <= table / 4


def test_a_model_trains_with_recorded_gradients_alone():
    block = {"kind": "block", "mixer": {"kind": "attention", "num_heads": 2}, "ffn": PEER}
    model = build_model({"d_model": 8, "vocab_size": 17, "seq_len": 9, "blocks": [block, block]}).train()
    optimizer = build_optimizer(model, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(("w_in", "w_out"))}
    tokens = torch.randint(17, (3, 9))
    model(tokens).logits.square().mean().backward()
    optimizer.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert len(before) == 4
    for name, p in model.named_parameters():
        if name in before:
            assert p.grad is None and (p != before[name]).any(), name
