"""Multi-head layers at the cost of ordinary ones: the paper's sizes, and counts on real tensors."""

import pytest
import torch

from sparsemix.api import build_layer, layer_cost
from sparsemix.config import ConfigError
from sparsemix.layers import Ctx
from sparsemix.layers.parity import parity
from sparsemix.ops.flop_counter import count_flops


@pytest.mark.parametrize(
    ("heads", "multiple_of", "width", "experts", "exact"),
    [(2, 8, 768, 40, 41.333), (2, 1, 768, 41, 41.333), (3, 8, 512, 96, 93), (3, 1, 512, 93, 93)],
)
def test_the_published_gated_sizes_come_out(heads, multiple_of, width, experts, exact):
    found = parity(768, 2048, 8, 1, heads, heads, gated=True, multiple_of=multiple_of)
    assert (found.d_ff, found.num_experts) == (width, experts)
    assert found.exact_d_ff == pytest.approx(width, abs=1e-9)
    assert found.exact_num_experts == pytest.approx(exact, abs=1e-3)
    assert found.flops_mismatch == 0
    assert found.flops == found.sparse_flops == 2 * 4_718_592


@pytest.mark.parametrize("d", [12, 768])
@pytest.mark.parametrize("E", [1, 4, 8, 32])
def test_two_matrices_and_three_heads_give_three_widths_and_four_times_the_experts_less_one(d, E):
    found = parity(d, 4 * d, E, 1, 3, 1, gated=False, multiple_of=1)
    assert (found.d_ff, found.num_experts) == (3 * d, 4 * E - 1)
    assert found.params_mismatch == found.flops_mismatch == 0


def test_two_matrices_and_two_heads_follow_the_same_algebra():
    d, E = 64, 8
    one, two = (parity(d, 4 * d, E, 1, 2, k, gated=False, multiple_of=1) for k in (1, 2))
    assert (one.d_ff, one.exact_num_experts) == (3 * d, pytest.approx((8 * E - 2) / 3))
    assert (two.d_ff, two.exact_num_experts) == (1.5 * d, pytest.approx((16 * E - 4) / 3))


@pytest.mark.parametrize(("heads", "k", "width", "experts"), [(4, 4, 384, 165.3), (2, 1, 1536, 20.67), (2, 3, 512, 62)])
def test_other_settings_of_equal_multiplications(heads, k, width, experts):
    found = parity(768, 2048, 8, 1, heads, k)
    assert found.d_ff == width
    assert found.exact_num_experts == pytest.approx(experts, abs=0.05)
    assert found.flops_mismatch == 0


def test_the_mismatch_of_rounding_is_stated():
    two, three = (parity(768, 2048, 8, 1, heads) for heads in (2, 3))
    assert two.params == 36_569_088 and two.sparse_params == 37_748_736
    assert two.params_mismatch == pytest.approx(0.96875 - 1)
    assert three.params == 38_928_384
    assert three.params_mismatch == pytest.approx(1.03125 - 1)
    odd = parity(60, 101, 4, 1, 3, 2)
    assert odd.exact_d_ff == pytest.approx((101 - 40) / 2)
    assert odd.flops_mismatch == pytest.approx((4 * 60**2 + 2 * 2 * 3 * 60 * 30) / (2 * 3 * 60 * 101) - 1)


@pytest.mark.parametrize(
    ("settings", "gate_macs"),
    [
        ({"kind": "moe", "num_experts": 8, "top_k": 1, "d_ff": 2048}, 6_144),
        ({"kind": "moe", "num_experts": 16, "top_k": 2, "d_ff": 1024}, 12_288),
        (parity(768, 2048, 8, 1, 2).settings(), 30_720),
        (parity(768, 2048, 8, 1, 3).settings(), 73_728),
    ],
    ids=["sparse", "fine_grained", "two_heads", "three_heads"],
)
def test_multiplications_counted_on_real_tensors_are_equal_to_the_unit(settings, gate_macs):
    layer = build_layer(settings, 768)
    with torch.no_grad():
        spent = count_flops(lambda: layer(torch.randn(1, 3, 768), Ctx()))
    assert spent == 3 * 2 * (4_718_592 + gate_macs)
    assert sum(p.numel() for p in layer.parameters()) == layer_cost(settings, 768, 3).params


def test_head_merge_and_gate_are_itemised():
    found = parity(768, 2048, 8, 1, 2)
    items = layer_cost(found.settings(), 768, 1).items
    assert items["linear"] == 2 * 2 * 768**2
    assert items["router"] == found.router_flops == 2 * 30_720
    assert items["linear"] + items["experts"] == found.flops
    assert found.sparse_router_flops == 2 * 6_144


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide d_model=768; choose a divisor"),
        ({"top_k": 9}, r"top_k=9 must lie in \[1, num_experts=8\]"),
        ({"d_ff": 0}, "d_ff=0 must be at least 1"),
        ({"d_ff": 400}, r"top_k \* d_ff=400 leaves no width for experts: head and merge alone cost 512 of it; .*"),
    ],
)
def test_sizes_that_cannot_match_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parity(**({"d_model": 768, "d_ff": 2048, "num_experts": 8} | change))
