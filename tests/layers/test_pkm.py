import itertools

import pytest
import torch
from cases import PKM, assert_is_its_loop, build, contexts, tokens
from torch.nn import functional as F

from sparsemix.config import ConfigError
from sparsemix.layers import Ctx, update

CHOICES = list(itertools.product(["batch", "layer", "none"], [True, False]))


@pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "padded")], ids=["plain", "padded"])
@pytest.mark.parametrize(("query_norm", "share_keys"), CHOICES)
def test_pkm_is_its_loop_over_tokens_and_all_values(query_norm, share_keys, ctx):
    assert_is_its_loop(build(PKM | {"query_norm": query_norm, "share_keys": share_keys}), tokens(), ctx)


@pytest.mark.parametrize(
    "change",
    [
        {"num_values": 1, "top_k": 1},
        {"top_k": 9},
        {"top_k": 1},
        {"num_heads": 1},
        {"num_values": 64, "top_k": 7, "d_key": 2},
    ],
    ids=["one_value", "every_value", "top_1", "one_head", "64_values"],
)
def test_pkm_is_its_loop_at_mean_sizes(change):
    assert_is_its_loop(build(PKM | change), tokens(), contexts()["padded"])


@pytest.mark.parametrize("T", [23, 63])
def test_pkm_is_its_loop_on_a_long_odd_sequence(T):
    assert_is_its_loop(build(PKM), tokens(1, T), Ctx())


@pytest.mark.parametrize("causal", [True, False])
def test_evaluation_uses_running_statistics(causal):
    layer, x = build(PKM), tokens()
    update(layer, layer(x + 1)[1].stats)
    assert_is_its_loop(layer.eval(), x, contexts()["all"]._replace(causal=causal))


def test_every_value_with_zero_keys_is_the_mean_value_of_every_head():
    layer = build(PKM | {"top_k": 9, "num_heads": 3})
    with torch.no_grad():
        layer.sub_keys.zero_()
    torch.testing.assert_close(layer(tokens())[0], 3 * layer.value_vectors.mean(0).expand(2, 7, -1), rtol=0, atol=1e-11)


def test_one_pick_a_head_is_a_plain_sum_of_values_and_trains_no_router():
    layer = build(PKM | {"top_k": 1, "query_norm": "layer"})
    x = tokens()
    y = layer(x)[0]
    y.square().sum().backward()
    for parameter in (layer.query.weight, layer.sub_keys, layer.query_norm.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0
    picked = layer.value_vectors.grad.abs().amax(1) > 0
    counts = layer.eval()(x)[1].stats["counts"]
    assert torch.equal(picked, counts > 0)
    assert counts.sum() == 2 * 14


def test_the_layer_is_an_embedding_bag_over_its_picks():
    layer, x = build(PKM), tokens()
    queries = layer.query_norm(layer.query(x.flatten(0, 1)).view(14, 2, 4), None)[0].view(14, 2, 2, 2)
    left, right = (torch.einsum("nhc,hic->nhi", queries[:, :, p], layer.sub_keys[:, p]) for p in (0, 1))
    scores = (left[..., :, None] + right[..., None, :]).flatten(2)  # (N, H, n n)
    best, ids = scores.topk(3)
    bags = F.embedding_bag(
        ids.flatten(1), layer.value_vectors, per_sample_weights=best.softmax(-1).flatten(1), mode="sum"
    )
    torch.testing.assert_close(layer(x)[0].flatten(0, 1), bags, rtol=0, atol=1e-11)


def test_the_memory_starts_with_the_output_variance_of_the_layer_it_replaces():
    x = F.normalize(torch.randn(1, 400, 96).double(), dim=-1) * 96**0.5
    pkm = build({"kind": "pkm", "num_values": 4096, "num_heads": 8, "top_k": 32, "d_key": 32}, 96)
    dense = build({"kind": "dense", "d_ff": 256}, 96)
    for layer in (pkm, dense):
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    spread = [float(layer(x)[0].detach().std()) for layer in (pkm, dense)]
    # A softmax that is not quite uniform leaves a factor of about 1.2.
    assert spread[0] == pytest.approx(spread[1], rel=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_values": 10}, "num_values=10 must be a square; the nearest are 9 and 16"),
        ({"top_k": 10}, r"top_k=10 must lie in \[1, num_values=9\]"),
        ({"d_key": 5}, "d_key=5 must be even: its halves meet the two key sides"),
        ({"gate": "sigmoid"}, "gate=sigmoid is no setting here.*"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        build(PKM | change)
