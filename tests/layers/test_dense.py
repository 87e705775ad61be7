import pytest
import torch
from cases import assert_is_its_loop, build, contexts, tokens


@pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "all")], ids=["plain", "all"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "silu"])
def test_dense_is_its_loop_over_tokens(activation, ctx):
    assert_is_its_loop(build({"kind": "dense", "d_ff": 7, "activation": activation}), tokens(), ctx)


@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
@pytest.mark.parametrize("precision", ["float", "ternary"])
def test_dense_with_biases_is_its_loop_over_tokens(activation, precision):
    layer = build({"kind": "dense", "d_ff": 7, "activation": activation, "bias": True, "precision": precision})
    assert min(assert_is_its_loop(layer, tokens(), contexts()["all"]).values()) > 0


def test_dense_is_its_loop_at_width_one():
    assert_is_its_loop(build({"kind": "dense", "d_ff": 1}), tokens(1, 63), contexts()["plain"])


def test_unit_inputs_give_unit_hidden_channels_at_the_start():
    layer = build({"kind": "dense", "d_ff": 999}, d_model=640)
    layer.up.reset_parameters()
    assert float(layer.up(torch.randn(50, 640).double()).detach().std()) == pytest.approx(1, rel=0.02)
