"""Running state under every number type, and updates that would silently do nothing."""

import copy

import pytest
import torch
from cases import BASES, MOE, D, build, tokens
from torch import nn

from sparsemix.config import ConfigError
from sparsemix.layers import Aux, Ctx, update

pytestmark = pytest.mark.usefixtures("unchecked")

THRESHOLDED = {"kind": "mod", "capacity": 0.5, "sampling": "threshold", "inner": BASES["block"]}
BIASED = MOE | {"bias_rate": 0.001}
STATEFUL = BASES | {
    "moe_bias": BIASED,
    "mod_threshold": THRESHOLDED,
    "mod_annealed": BASES["mod"] | {"anneal_steps": 30},
    "mod_random": {"kind": "mod", "capacity": 0.5, "selector": "random", "inner": BIASED},
    "mode_choice": BASES["mode"] | {"routing": "expert_choice", "z_weight": 0.0},
    "ternary": {"kind": "dense", "d_ff": 7, "precision": {"weights": "ternary", "warmup_steps": 30}},
}


def default_bf16(layer, config):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = build(config).bfloat16()
    finally:
        torch.set_default_dtype(before)
    other.load_state_dict(layer.state_dict())
    return other


def assigned(layer, config):
    other = build(config).float()
    low = {name: v.bfloat16() if v.is_floating_point() else v for name, v in layer.state_dict().items()}
    other.load_state_dict(low, assign=True)
    return other


CASTS = {
    "to": lambda layer, _: layer.to(torch.bfloat16),
    "half": lambda layer, _: layer.half(),
    "there and back": lambda layer, _: layer.bfloat16().float(),
    "default": default_bf16,
    "assigned": assigned,
}


def steps(layer, observations):
    for stats in observations:
        update(layer, stats)
    return dict(layer.named_buffers())


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("kind", STATEFUL)
def test_running_state_moves_as_in_fp32_under_every_number_type(kind, cast):
    torch.manual_seed(3)
    layer = build(STATEFUL[kind]).float()
    observations = [layer(tokens().float())[1].stats for _ in range(20)]
    twin = cast(copy.deepcopy(layer), STATEFUL[kind]).train()
    wanted, got = steps(layer, observations), steps(twin, observations)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_balance_bias_is_twenty_rates_away_after_twenty_steps(cast):
    layer = cast(build(BIASED).float(), BIASED).train()
    load = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1], dtype=torch.double)
    steps(layer, [{"load": load}] * 20)
    wanted = 0.001 * 20 * torch.tensor([-1.0, 1, 1, 1, 1])
    torch.testing.assert_close(layer.bias, wanted, rtol=1e-5, atol=0)
    # The control: in bf16 the same steps end elsewhere.
    low = torch.zeros(5, dtype=torch.bfloat16)
    for _ in range(20):
        low += 0.001 * (0.2 - load).sign().bfloat16()
    assert (low.float() - wanted).abs().max() > 1e-4


class Net(nn.Module):
    """A layer inside somebody's own model."""

    def __init__(self, **layers):
        super().__init__()
        self.parts = nn.ModuleDict(layers)
        self.head = nn.Linear(D, D)


def test_statistics_of_a_part_are_refused_for_the_whole_with_the_call_that_works():
    layer = build(BASES["peer"])
    net, stats = Net(ffn=layer), layer(tokens())[1].stats
    with pytest.raises(ConfigError, match=r"has an entry of no layer inside this Net: query_norm\.mean") as error:
        update(net, stats)
    assert "\n" not in str(error.value) and "lacks parts.ffn.query_norm.mean" in str(error.value)
    assert int(layer.query_norm.num_updates) == 0
    call = str(error.value).split("call ")[1].split(", or")[0].removeprefix("sparsemix.")
    assert call == "update(module.get_submodule('parts.ffn'), aux.stats)"
    eval(call, {"update": update, "module": net, "aux": Aux({}, stats)})
    assert int(layer.query_norm.num_updates) == 1
    update(net, Aux({}, stats).under("parts.ffn").stats)
    assert int(layer.query_norm.num_updates) == 2


def test_statistics_of_the_whole_are_refused_for_a_part():
    layer = build(BASES["peer"])
    stats = layer(tokens())[1].under("parts.ffn").stats
    with pytest.raises(ConfigError, match=r"on the module that holds this one as parts\.ffn, or pass its own aux"):
        update(layer, stats)


def test_a_missing_observation_is_refused_with_the_way_to_join():
    first, second = build(BASES["peer"]), build(BASES["pkm"])
    net = Net(a=first, b=second)
    said = [layer(tokens())[1].under(f"parts.{name}") for name, layer in net.parts.items()]
    with pytest.raises(ConfigError, match=r"lacks parts.b.query_norm.mean.*pass together .*aux_a.under\('a'\) \| "):
        update(net, said[0].stats)
    with pytest.raises(ConfigError, match=r"lacks parts\.a\.query_norm\.mean"):
        update(net, {})
    update(net, (said[0] | said[1]).stats)
    assert int(first.query_norm.num_updates) == int(second.query_norm.num_updates) == 1
    # A part that is frozen in evaluation observes nothing.
    second.eval()
    update(net, said[0].stats)
    assert int(first.query_norm.num_updates) == 2


def test_a_wrapper_around_the_model_is_named():
    layer = build(BASES["peer"])
    wrapper = nn.Sequential()
    wrapper.add_module("module", layer)
    with pytest.raises(ConfigError, match=r"sparsemix.update\(module.get_submodule\('module'\), aux.stats\)"):
        update(wrapper, layer(tokens())[1].stats)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", STATEFUL)
def test_every_training_call_returns_what_its_layers_observe(kind, causal):
    layer = build(STATEFUL[kind])
    update(layer, layer(tokens())[1].stats)
    if hasattr(layer, "threshold") and layer.threshold is not None:
        layer.threshold.threshold.fill_(torch.inf)  # nobody passes
    update(layer, layer(tokens(), Ctx(causal=causal))[1].stats)


EMPTY = {"no rows": (0, 7), "no tokens": (2, 0), "padding": (2, 7)}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("kind", STATEFUL)
def test_a_batch_without_a_real_token_has_finite_statistics_and_losses_of_zero(kind, shape):
    layer = build(STATEFUL[kind])
    update(layer, layer(tokens())[1].stats)
    x = torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)
    valid = torch.zeros(shape, dtype=torch.bool)
    for ctx in (Ctx(valid=valid), *([Ctx()] if x.numel() == 0 else [])):
        before = {name: buffer.clone() for name, buffer in layer.named_buffers() if buffer.is_floating_point()}
        y, aux = layer(x, ctx)
        assert y.shape == x.shape
        for name, value in aux.losses.items():
            assert float(value.detach()) == 0, name
        for name, value in aux.stats.items():
            assert value.isfinite().all(), name
        total = sum(aux.losses.values()) + 0 * y.sum()
        for name, grad in zip(
            dict(layer.named_parameters()),
            torch.autograd.grad(total, list(layer.parameters()), materialize_grads=True, allow_unused=True),
            strict=True,
        ):
            assert not grad.any(), name
        if not kind.startswith("moe"):  # an even load moves no bias, but is no average either
            update(layer, aux.stats)
            for name, value in before.items():
                torch.testing.assert_close(layer.get_buffer(name), value, msg=lambda m, n=name: f"{n}: {m}")
        assert all(value.isfinite().all() for value in layer.eval()(x, ctx)[1].stats.values())
        layer.train()
