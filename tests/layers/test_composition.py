"""Every wrapper around every kind in every precision, and random nestings: each is its loop and keeps every promise."""

import pytest
import torch
import yaml
from cases import BASES, assert_is_its_loop, build, contexts, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemix.api import layer_cost
from sparsemix.config import parse, to_yaml
from sparsemix.layers import Ctx, LayerConfig, update
from sparsemix.ops.flop_counter import count_flops

pytestmark = pytest.mark.usefixtures("unchecked")

D = 12
ATTENTION = {"kind": "attention", "num_heads": 3}
DENSE = {"kind": "dense", "d_ff": 7}
MOE = {"kind": "moe", "num_experts": 5, "top_k": 2, "d_ff": 3}
FEEDS = {
    "dense": DENSE,
    "moe": MOE,
    "moe_capacity": MOE | {"capacity_factor": 0.7},
    "expert_choice": BASES["expert_choice"],
    "pkm": BASES["pkm"],
    "peer": BASES["peer"],
    "mode": BASES["mode"],
    "mode_expert_choice": BASES["mode"] | {"routing": "expert_choice", "balance_weight": None},
    # Without a bias the ternary sums of so narrow heads are small whole numbers, and rounding them again meets ties.
    "mh_moe": {"kind": "mh_moe", "num_heads": 2, "inner": MOE, "bias": True},
}


def block(ffn):
    return {"kind": "block", "mixer": ATTENTION, "ffn": ffn}


def mod(inner, **change):
    return {"kind": "mod", "capacity": 0.6, "predictor_width": 3, "inner": inner} | change


WRAPPERS = {
    "block": block,
    "mod_of_a_feed_forward": mod,
    "mod_of_a_block": lambda ffn: mod(block(ffn)),
    "mod_of_a_mod": lambda ffn: mod(mod(block(ffn), sampling="threshold")),
    "token_choice": lambda ffn: mod(block(ffn), selector="token_choice"),
    "mh_moe": lambda ffn: {"kind": "mh_moe", "num_heads": 3, "inner": ffn, "bias": True},
    "block_of_a_mod": lambda ffn: block(mod(ffn)),
    "beside_a_dense_layer": lambda ffn: block({"kind": "beside", "kept": DENSE, "added": ffn}),
}


def with_precision(config, precision):
    """The settings with every matrix inside in `precision`."""
    if not isinstance(config, dict):
        return config
    changed = {name: with_precision(value, precision) for name, value in config.items()}
    fields = LayerConfig.family[config["kind"]].model_fields
    return changed | ({"precision": precision} if "precision" in fields else {})


def observed(config, **kwargs):
    layer = build(config, D, **kwargs)
    update(layer, layer(tokens(d_model=D), Ctx())[1].stats)
    return layer


@pytest.mark.parametrize("precision", ["float", "ternary"])
@pytest.mark.parametrize("ffn", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_every_wrapper_of_every_kind_is_its_loop(wrapper, ffn, precision):
    layer = observed(with_precision(wrapper(ffn), precision))
    for causal in (False, True):
        assert_is_its_loop(layer, tokens(d_model=D), contexts()["all"]._replace(causal=causal))


def divisors(d):
    return [h for h in range(1, d + 1) if d % h == 0]


@st.composite
def leaves(draw, d):
    """A layer without layers inside that fits width d."""
    sizes = st.integers(1, 5)
    kinds = ["dense", "moe", "expert_choice", "pkm", "peer", "mode"]
    heads = [h for h in divisors(d) if d % (2 * h) == 0]
    kind = draw(st.sampled_from(kinds + (["attention"] if heads else [])))
    if kind == "attention":
        return {"kind": kind, "num_heads": draw(st.sampled_from(heads))}
    activation = draw(st.sampled_from(["swiglu", "geglu", "gelu", "relu", "silu"]))
    if kind == "dense":
        return {"kind": kind, "d_ff": draw(sizes), "activation": activation}
    if kind in ("pkm", "peer"):
        n = draw(st.integers(1, 4))
        look_up = {"num_heads": draw(sizes), "top_k": draw(st.integers(1, n * n)), "d_key": 2 * draw(sizes)}
        look_up |= {
            "query_norm": draw(st.sampled_from(["batch", "layer", "none"])),
            "share_keys": draw(st.booleans()),
        }
        return {"kind": kind, {"pkm": "num_values", "peer": "num_experts"}[kind]: n * n} | look_up
    E = draw(sizes)
    experts = {"kind": kind, "num_experts": E, "d_ff": draw(sizes), "activation": activation}
    if kind == "expert_choice":
        return experts | {
            # One expert has nothing to compare, so it must take everyone.
            "capacity_factor": draw(st.sampled_from([0.5, 1.0, 2.0] if E > 1 else [1.0, 2.0])),
            "group": draw(st.sampled_from(["sequence", "batch"])),
        }
    experts["top_k"] = draw(st.integers(1, E))
    if kind == "mode":
        return experts | {"num_noop": draw(sizes)}
    rates = {"z_weight": draw(st.sampled_from([0.0, 0.1])), "bias_rate": draw(st.sampled_from([0.0, 0.01]))}
    return experts | rates | {"capacity_factor": draw(st.sampled_from([None, 0.5, 1.25]))}


@st.composite
def layers(draw, d=D, depth=3):
    """Any legal nesting of at most `depth` wrappers."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(leaves(d))
    kind = draw(st.sampled_from(["mod", "mh_moe", "block"]))
    if kind == "block":
        return {"kind": kind, "mixer": draw(layers(d, depth - 1)), "ffn": draw(layers(d, depth - 1))}
    if kind == "mh_moe":
        h = draw(st.sampled_from(divisors(d)))
        flags = {"bias": draw(st.booleans()), "inner_residual": draw(st.booleans())}
        return {"kind": kind, "num_heads": h, "inner": draw(layers(d // h, depth - 1)), **flags}
    selector = draw(st.sampled_from(["expert_choice", "token_choice", "random", "strided"]))
    wrap = {
        "kind": kind,
        "inner": draw(layers(d, depth - 1)),
        "selector": selector,
        "capacity": draw(st.sampled_from([0.125, 0.4, 0.9] + ([1.0, 3] if selector == "expert_choice" else []))),
        "gate": draw(st.sampled_from(["sigmoid", "raw", "two_sigmoid", "one"])),
        "block_output": draw(st.sampled_from(["delta", "full"])),
        "predictor_width": 2,
    }
    if selector == "expert_choice":
        wrap["sampling"] = draw(st.sampled_from(["predictor", "router_bce", "threshold"]))
    return wrap


nestings = st.tuples(layers(), st.sampled_from(["float", "ternary"])).map(lambda pair: with_precision(*pair))
many = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def routers_without_a_say(layer):
    """Parameters of routers whose scores reach neither the update nor a loss."""
    for name, module in layer.named_modules():
        config = getattr(module, "config", None)
        if getattr(config, "kind", "") == "mod" and config.gate == "one":
            yield f"{name}.router.weight".lstrip(".")


@many
@given(nestings)
def test_a_random_nesting_has_shape_and_a_finite_gradient_for_every_parameter(config):
    layer, x = build(config, D), tokens(d_model=D).requires_grad_()
    y, aux = layer(x, Ctx())
    assert y.shape == x.shape and torch.isfinite(y).all()
    total = y.square().sum() + sum(aux.losses.values())
    if not total.requires_grad:
        return
    total.backward()
    idle = set(routers_without_a_say(layer))
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None or name in idle, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@many
@given(nestings)
def test_a_random_nesting_costs_what_a_counter_sees(config):
    layer, x = build(config, D), tokens(1, 23, D)
    with torch.no_grad():
        said = []
        spent = count_flops(lambda: said.append(layer(x, Ctx())[1].stats))
    extra = sum(float(value) for name, value in said[0].items() if name.split(".")[-1] == "extra_flops")
    cost = layer_cost(config, D, 23)
    assert spent == pytest.approx(cost.flops + extra, rel=1e-9)
    assert sum(p.numel() for p in layer.parameters()) == cost.params


@many
@given(nestings)
def test_later_tokens_and_other_rows_cannot_reach_a_random_nesting(config):
    layer, x = observed(config).eval(), tokens(3, 9, D)
    y = layer(x)[0]
    for t in (1, 5, 8):
        changed = x.clone()
        changed[:, t:] = torch.randn_like(changed[:, t:])
        torch.testing.assert_close(layer(changed)[0][:, :t], y[:, :t], rtol=0, atol=1e-11)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(layer(x[order])[0], y[order], rtol=0, atol=1e-11)
    torch.testing.assert_close(layer(x[1:2])[0], y[1:2], rtol=0, atol=1e-11)


@many
@given(nestings)
def test_settings_and_weights_of_a_random_nesting_survive_being_saved(config):
    parsed = parse(LayerConfig, config)
    assert parse(LayerConfig, yaml.safe_load(to_yaml(parsed))) == parsed
    layer, x = observed(config).eval(), tokens(d_model=D)
    other = build(config, D, seed=1).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])
