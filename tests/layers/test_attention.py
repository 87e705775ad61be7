import pytest
import torch
from cases import assert_is_its_loop, build, contexts, tokens

from sparsemix.config import ConfigError, parse
from sparsemix.layers import Ctx
from sparsemix.layers.rotary import RopeScaling


@pytest.mark.parametrize("ctx", contexts().values(), ids=contexts())
@pytest.mark.parametrize("heads", [(1, None), (5, None), (5, 1)], ids=["one_head", "five_heads", "five_heads_one_kv"])
def test_attention_is_its_loop_over_tokens(heads, ctx):
    layer = build({"kind": "attention", "num_heads": heads[0], "num_kv_heads": heads[1], "rope_theta": 100.0})
    assert_is_its_loop(layer, tokens(), ctx)


@pytest.mark.parametrize("ctx", [contexts(1, 63)[name] for name in ("plain", "all")], ids=["plain", "all"])
def test_attention_is_its_loop_on_a_long_odd_sequence(ctx):
    assert_is_its_loop(build({"kind": "attention", "num_heads": 1}), tokens(1, 63), ctx)


def test_four_heads_share_two_key_value_heads_in_order():
    layer = build({"kind": "attention", "num_heads": 4, "num_kv_heads": 2}, d_model=8)
    assert_is_its_loop(layer, tokens(2, 7, 8), contexts()["all"])


LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_seq_len": 40}
SETTINGS = {
    "wider_heads": {"num_heads": 3, "d_head": 6},
    "narrow_heads": {"num_heads": 2, "num_kv_heads": 1, "d_head": 2},
    "bias_qkv": {"num_heads": 5, "bias": "qkv"},
    "bias_all": {"num_heads": 5, "num_kv_heads": 1, "bias": "all"},
    "normed_heads": {"num_heads": 5, "num_kv_heads": 1, "qk_norm": {"over": "head", "eps": 0.01}},
    "normed_whole": {"num_heads": 4, "num_kv_heads": 2, "d_head": 4, "qk_norm": "full"},
    "window": {"num_heads": 5, "window": 3},
    "window_of_one": {"num_heads": 1, "window": 1},
    "linear": {"num_heads": 1, "rope_theta": 100.0, "rope_scaling": {"kind": "linear", "factor": 2.5}},
    "llama3": {"num_heads": 1, "rope_theta": 100.0, "rope_scaling": LLAMA3},
    "unturned": {"num_heads": 2, "rope_theta": None},
    "qwen3_like": {"num_heads": 2, "num_kv_heads": 1, "d_head": 8, "bias": "qkv", "qk_norm": "head", "window": 4},
    "ternary": {"num_heads": 2, "d_head": 4, "bias": "all", "qk_norm": "head", "precision": "ternary"},
}


@pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "all")], ids=["plain", "all"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_attention_of_every_family_is_its_loop_over_tokens(settings, ctx):
    grads = assert_is_its_loop(build({"kind": "attention", **settings}), tokens(), ctx)
    # A token that sees itself alone has no choice.
    alone = [name for name in grads if settings.get("window") == 1 and name[0] in "qk"]
    assert all(size > 0 for name, size in grads.items() if name not in alone)


def test_the_blend_of_scaled_speeds_has_all_three_parts():
    speeds = 100.0 ** -(torch.arange(5, dtype=torch.float64) / 5)
    share = parse(RopeScaling, LLAMA3).apply(speeds) / speeds
    assert share[0] == 1 and share[-1] == 1 / 8 and (share.diff() <= 0).all()
    assert ((share > 1 / 8) & (share < 1)).any()


def test_a_window_as_long_as_the_text_is_no_window():
    layer, x = build({"kind": "attention", "num_heads": 5, "window": 7}), tokens()
    whole = build({"kind": "attention", "num_heads": 5})
    assert torch.equal(layer(x)[0], whole(x)[0])
    shorter = build({"kind": "attention", "num_heads": 5, "window": 6})(x)[0]
    assert torch.equal(shorter[:, :6], whole(x)[0][:, :6]) or (shorter - whole(x)[0])[:, :6].abs().max() < 1e-11
    assert (shorter - whole(x)[0])[:, 6].abs().max() > 1e-4


def test_only_distances_between_positions_matter():
    layer, x, positions = build({"kind": "attention", "num_heads": 5}), tokens(), contexts()["moved"].positions
    y = layer(x, Ctx(positions=positions))[0]
    torch.testing.assert_close(layer(x, Ctx(positions=positions + 1000))[0], y, rtol=0, atol=1e-11)
    assert (layer(x, Ctx(positions=positions * 2))[0] - y).abs().max() > 1e-3


def test_a_width_without_even_heads_says_so_with_the_way_out():
    with pytest.raises(ConfigError, match=r"num_heads=4 must give every head an even width: .*; choose another"):
        build({"kind": "attention", "num_heads": 4}, d_model=12)


def test_key_value_heads_must_divide_the_heads():
    with pytest.raises(ConfigError, match=r"num_kv_heads=3 must divide num_heads=4"):
        build({"kind": "attention", "num_heads": 4, "num_kv_heads": 3}, d_model=16)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"d_head": 5}, "d_head=5 must be even, or rope_theta null"),
        ({"rope_theta": None, "rope_scaling": LLAMA3}, "rope_theta=None must be a number where rope_scaling is set"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 2}},
            "kind=yarn input should be 'linear' or 'llama3'",
        ),
        ({"rope_scaling": {"kind": "llama3", "factor": 2}}, "original_seq_len=None is for kind=llama3, which needs it"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}},
            "high_freq_factor=1.0 must be more than",
        ),
        ({"qk_norm": "heads"}, "qk_norm: 'heads' is none of none, head, full; did you mean 'head'?"),
        ({"bias": "q"}, "bias=q input should be 'none', 'qkv' or 'all'"),
        ({"num_heads": 3, "rope_theta": None}, "num_heads=3 must give every head a whole width"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings, wanted):
    with pytest.raises(ConfigError) as caught:
        build({"kind": "attention", "num_heads": 5, **settings})
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
