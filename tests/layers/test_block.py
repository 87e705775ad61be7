import pytest
import torch
from cases import assert_is_its_loop, build, contexts, tokens

ATTENTION = {"kind": "attention", "num_heads": 5}
FEEDS = {
    "dense": {"kind": "dense", "d_ff": 7},
    "moe": {"kind": "moe", "num_experts": 5, "top_k": 2, "d_ff": 3, "z_weight": 0.1},
    "peer": {"kind": "peer", "num_experts": 9, "num_heads": 2, "top_k": 3, "d_key": 4},
    "mh_moe": {"kind": "mh_moe", "num_heads": 5, "inner": {"kind": "moe", "num_experts": 3, "top_k": 2, "d_ff": 3}},
    "mod": {"kind": "mod", "capacity": 0.5, "predictor_width": 3, "inner": {"kind": "dense", "d_ff": 7}},
}


@pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "all")], ids=["plain", "all"])
@pytest.mark.parametrize("ffn", FEEDS.values(), ids=FEEDS)
def test_a_block_is_its_loop_with_every_feed_forward(ffn, ctx):
    layer = build({"kind": "block", "mixer": ATTENTION, "ffn": ffn})
    assert_is_its_loop(layer, tokens(), ctx)


@pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "all")], ids=["plain", "all"])
@pytest.mark.parametrize("norm", ["layer", {"kind": "layer", "eps": 0.1}, {"kind": "rms", "eps": 0.1}], ids=str)
def test_a_block_is_its_loop_with_every_norm(norm, ctx):
    layer = build({"kind": "block", "mixer": ATTENTION, "ffn": FEEDS["dense"], "norm": norm})
    assert min(assert_is_its_loop(layer, tokens(), ctx).values()) > 0


def test_the_second_norm_reads_the_stream_after_the_mixer():
    layer, x = build({"kind": "block", "mixer": ATTENTION, "ffn": FEEDS["dense"]}), tokens()
    mixed = layer.mixer(layer.mixer_norm(x))[0]
    update = layer.ffn(layer.ffn_norm(x + mixed))[0]
    torch.testing.assert_close(layer(x)[0], mixed + update, rtol=0, atol=1e-12)
    assert (layer(x)[0] - mixed - layer.ffn(layer.ffn_norm(x))[0]).abs().max() > 1e-3
