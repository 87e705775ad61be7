import pytest
import torch
from cases import assert_is_its_loop, build, contexts, tokens

from sparsemix.config import ConfigError
from sparsemix.layers import Ctx


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
