"""Number types that do not go together: PyTorch's kind of error or the right answer, and autocast's cast."""

import pytest
import torch
from cases import BASES, tokens
from test_default_dtype import KINDS, D

from sparsemix.config import parse
from sparsemix.layers import Ctx, LayerConfig, update

pytestmark = pytest.mark.usefixtures("unchecked")

SAYS = ("dtype", "type", "Float", "Double", "BFloat16")


def built(kind):
    """A layer whose running state has seen a step."""
    torch.manual_seed(0)
    layer = parse(LayerConfig, KINDS[kind]).build(D)
    update(layer, layer(tokens(2, 7, D).float())[1].stats)
    return layer.eval()


def assert_right_or_refused(layer, x, wanted):
    """Rounding of bf16 moves an output by a few per cent, and a token here and there to another expert; a kernel that
    misreads numbers moves all of them by more than all of it."""
    try:
        torch.manual_seed(1)
        y = layer(x, Ctx())[0]
        y.float().square().sum().backward()
    except RuntimeError as error:
        assert any(word in str(error) for word in SAYS), error
        return False
    assert y.isfinite().all()
    assert ((y.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-9)).median() <= 0.1
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())
    return True


def answer(kind, x):
    torch.manual_seed(1)
    with torch.no_grad():
        return built(kind)(x, Ctx())[0].double()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_weights_of_two_types_are_refused_or_answered_rightly(kind):
    x = tokens(2, 7, D).bfloat16().float()
    wanted = answer(kind, x)
    assert_right_or_refused(built(kind), x.bfloat16(), wanted)
    assert_right_or_refused(built(kind).bfloat16(), x, wanted)
    assert assert_right_or_refused(built(kind).double(), x.double(), wanted)


@pytest.mark.parametrize("kind", [*BASES, "moe_otherwise", "dense_otherwise"])
def test_one_matrix_of_another_type_is_refused_or_answered_rightly(kind):
    x = tokens(2, 7, D).bfloat16().float()
    wanted = answer(kind, x)
    for name in dict(built(kind).named_parameters()):
        for all_others, this_one in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
            layer = built(kind).to(all_others)
            parameter = layer.get_parameter(name)
            parameter.data = parameter.data.to(this_one)
            assert_right_or_refused(layer, x.to(all_others), wanted)


@pytest.mark.parametrize("kind", BASES)
def test_autocast_casts_what_would_be_refused(kind):
    x = tokens(2, 7, D).bfloat16().float()
    wanted = answer(kind, x)
    for layer, given in ((built(kind), x.bfloat16()), (built(kind), x)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert assert_right_or_refused(layer, given, wanted)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_takes_tokens_of_another_16_bit_type(kind, dtype):
    layer = parse(LayerConfig, BASES[kind]).build(D).to(dtype)
    x, other = torch.randn(2, 7, D).to(torch.float16), torch.bfloat16
    for given, cast in ((x, other), (x.to(other), torch.float16)):
        with torch.autocast("cpu", dtype=cast):
            y, _ = layer(given, Ctx())
        assert y.shape == given.shape and y.isfinite().all()
        y.float().sum().backward()
