"""Linear maps: torch's own kind, with our starting values."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsemix.layers.linear import ExactLinear, Linear
from sparsemix.layers.ternary import PrecisionConfig


@pytest.mark.parametrize("kind", [Linear, ExactLinear])
@pytest.mark.parametrize("settings", [{}, {"bias": True, "gain": 0.5}, {"dtype": torch.float64}], ids=str)
def test_a_linear_map_is_torchs_and_starts_with_one_draw_of_ours(kind, settings):
    torch.manual_seed(5)
    layer = kind(in_features=7, out_features=5, **settings)
    after = torch.rand(())
    torch.manual_seed(5)
    wanted = torch.empty(5, 7, dtype=settings.get("dtype")).normal_(std=settings.get("gain", 1.0) * 7**-0.5)
    assert torch.equal(layer.weight, wanted) and torch.equal(torch.rand(()), after)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (7, 5)
    names = {"weight": (5, 7)} | ({"bias": (5,)} if settings.get("bias") else {})
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == names
    x = torch.randn(3, 7, dtype=layer.weight.dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.bias is None or not layer.bias.any()
    with torch.device("meta"):
        assert kind(7, 5).weight.is_meta


def test_a_ternary_map_is_a_linear_map_too():
    layer = Linear(7, 5, precision=PrecisionConfig(weights="ternary", warmup_steps=3))
    assert isinstance(layer, nn.Linear) and list(layer.state_dict()) == ["weight", "warmup.step"]


def test_an_exact_map_does_not_round_under_autocast():
    layer, x = ExactLinear(64, 5, bias=True), torch.randn(3, 64)
    wanted = F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), wanted)
        assert Linear(64, 5)(x).dtype == torch.bfloat16
    rounded = layer.bfloat16()
    torch.testing.assert_close(rounded(x.bfloat16()), F.linear(x.bfloat16().float(), rounded.weight.float()))
