"""What every registered kind promises, whatever it does inside."""

import pytest
import torch
import yaml
from cases import BASES, D, build, tokens
from torch.nn.utils import parametrize

from sparsemix.api import layer_cost
from sparsemix.config import parse, to_yaml
from sparsemix.layers import Ctx, Layer, LayerConfig, update

KINDS = sorted(LayerConfig.family)
DENSE_NAMES = {"gate.weight": (7, D), "up.weight": (7, D), "down.weight": (D, 7)}
ATTENTION_NAMES = {f"{name}.weight": (D, D) for name in "qkvo"}
QUERY_NAMES = {
    "query.weight": (8, D),
    "query.bias": (8,),
    "query_norm.weight": (2, 4),
    "query_norm.bias": (2, 4),
}
PEER_NAMES = QUERY_NAMES | {"sub_keys": (2, 3, 2), "w_in": (9, D), "w_out": (9, D)}


def under(prefix, names):
    return {f"{prefix}.{name}": shape for name, shape in names.items()}


NORMS = {"mixer_norm.weight": (D,), "ffn_norm.weight": (D,)}
NAMES = {
    "attention": ATTENTION_NAMES,
    "dense": DENSE_NAMES,
    "moe": {
        "router.weight": (5, D),
        "experts.gate_up": (5, 6, D),
        "experts.down": (5, D, 3),
        "shared.gate.weight": (4, D),
        "shared.up.weight": (4, D),
        "shared.down.weight": (D, 4),
    },
    "pkm": QUERY_NAMES | {"sub_keys": (2, 2, 3, 2), "value_vectors": (9, D)},
    "expert_choice": {
        "router.weight": (5, D),
        "experts.gate_up": (5, 6, D),
        "experts.down": (5, D, 3),
        "shared.gate.weight": (4, D),
        "shared.up.weight": (4, D),
        "shared.down.weight": (D, 4),
    },
    "mode": {"router.weight": (8, D), "experts.gate_up": (6, 6, D), "experts.down": (6, D, 3)},
    "peer": PEER_NAMES,
    "mh_moe": {
        "head.weight": (D, D),
        "head.bias": (D,),
        "merge.weight": (D, D),
        "merge.bias": (D,),
        "inner.router.weight": (5, 2),
        "inner.experts.gate_up": (5, 6, 2),
        "inner.experts.down": (5, 2, 3),
    },
    "mod": {
        "router.weight": (1, D),
        "predictor.up.weight": (3, D),
        "predictor.up.bias": (3,),
        "predictor.down.weight": (1, 3),
        "predictor.down.bias": (1,),
        **under("inner", NORMS | under("mixer", ATTENTION_NAMES) | under("ffn", DENSE_NAMES)),
    },
    "block": NORMS | under("mixer", ATTENTION_NAMES) | under("ffn", PEER_NAMES),
    "beside": under("kept", DENSE_NAMES) | under("added", PEER_NAMES),
}
pytestmark = pytest.mark.parametrize("kind", KINDS)


def observed(kind):
    layer = build(BASES[kind])
    update(layer, layer(tokens())[1].stats)
    return layer


def test_a_layer_alone_works_in_training_and_in_evaluation(kind):
    layer, x = observed(kind), tokens()
    for training in (True, False):
        y, _ = layer.train(training)(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert torch.isfinite(y).all()
        assert torch.equal(y, layer(x, Ctx(causal=not training))[0])


def test_losses_are_scalars_and_statistics_detached(kind):
    layer = observed(kind)
    for training in (True, False):
        _, aux = layer.train(training)(tokens())
        assert all(value.shape == () and torch.isfinite(value) for value in aux.losses.values())
        assert not any(value.requires_grad for value in aux.stats.values())


def test_every_parameter_gets_a_finite_gradient(kind):
    layer = build(BASES[kind])
    y, aux = layer(tokens())
    (y.square().sum() + sum(aux.losses.values())).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_parameters_have_the_documented_names_and_shapes(kind):
    layer = build(BASES[kind])
    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == NAMES[kind]


def test_a_layer_that_observes_updates(kind):
    for module in build(BASES[kind]).modules():
        if isinstance(module, Layer) and module.observes:
            assert type(module).update is not Layer.update, type(module)


def test_forward_keeps_no_tensor_on_the_layer(kind):
    layer = observed(kind)
    layer(tokens())
    for module in layer.modules():
        assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]


def test_every_owner_of_parameters_can_draw_them_and_every_buffer_is_saved(kind):
    for module in build(BASES[kind]).modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert callable(getattr(module, "reset_parameters", None)), type(module)
        assert not module._non_persistent_buffers_set


def test_a_saved_layer_loads_bit_for_bit(kind, tmp_path):
    layer, x = observed(kind).eval(), tokens()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = build(BASES[kind], seed=1).eval()
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(other(x)[0], layer(x)[0])


def test_settings_survive_yaml(kind):
    config = parse(LayerConfig, BASES[kind])
    assert parse(LayerConfig, yaml.safe_load(to_yaml(config))) == config
    assert config.kind == kind
    assert isinstance(config.looks_ahead, bool)


def test_a_build_on_the_meta_device_has_the_parameters_that_the_cost_says(kind):
    with torch.device("meta"):
        layer = parse(LayerConfig, BASES[kind]).build(D)
    assert sum(parameter.numel() for parameter in layer.parameters()) == layer_cost(BASES[kind], D, 7).params


def test_low_precision_autocast_gives_finite_updates_and_gradients(kind):
    layer, x = build(BASES[kind]).float(), tokens().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, aux = layer(x)
    assert torch.isfinite(y).all()
    (y.float().sum() + sum(aux.losses.values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *layer.parameters()) if p.grad is not None)


def test_every_parameter_can_be_parametrised(kind):
    """torch keeps what it parametrises in a ModuleDict, which has methods called keys and values."""
    layer, x = observed(kind).eval(), tokens()
    wanted = layer(x)[0]
    for name, _ in list(layer.named_parameters()):
        owner, _, own = name.rpartition(".")
        parametrize.register_parametrization(layer.get_submodule(owner), own, torch.nn.Identity())
    assert torch.equal(layer(x)[0], wanted)
