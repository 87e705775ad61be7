from itertools import pairwise

import pytest
import torch

from sparsemix.api import build_layer, build_model, build_optimizer
from sparsemix.optim import clip_groups, schedule, second_stage
from sparsemix.optim.groups import split

MOE = {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 5, "shared_d_ff": 3}
ATTENTION = {"kind": "attention", "num_heads": 2}
PEER = {"kind": "peer", "num_experts": 16, "num_heads": 2, "top_k": 3, "d_key": 4}
PKM = {"kind": "pkm", "num_values": 16, "num_heads": 2, "top_k": 3, "d_key": 4}
MH_MOE = {"kind": "mh_moe", "num_heads": 2, "inner": MOE, "bias": True}


def block(ffn):
    return {"kind": "block", "mixer": ATTENTION, "ffn": ffn}


def model_of_every_kind():
    blocks = [block(PEER), block(PEER | {"query_norm": "layer", "share_keys": False}), block(MH_MOE)]
    blocks += [{"kind": "mod", "inner": block({"kind": "dense", "d_ff": 6})}, block(PKM)]
    return build_model({"d_model": 8, "vocab_size": 17, "seq_len": 9, "blocks": blocks})


EXPERTS = ["router.weight", "experts.gate_up", "experts.down"]
FEED = ["gate.weight", "up.weight", "down.weight"]
DECAYED = {
    *(
        f"blocks.{i}.{name}.weight"
        for i in ("0.mixer", "1.mixer", "2.mixer", "3.inner.mixer", "4.mixer")
        for name in "qkvo"
    ),
    "blocks.0.ffn.query.weight",
    "blocks.1.ffn.query.weight",
    "blocks.4.ffn.query.weight",
    "blocks.2.ffn.head.weight",
    "blocks.2.ffn.merge.weight",
    *(f"blocks.2.ffn.inner.{name}" for name in EXPERTS),
    *(f"blocks.2.ffn.inner.shared.{name}" for name in FEED),
    *(f"blocks.3.inner.ffn.{name}" for name in FEED),
    "blocks.3.router.weight",
    "blocks.3.predictor.up.weight",
    "blocks.3.predictor.down.weight",
}


def groups_by_name(model, optimizer):
    """Weight decay -> names of the parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["weight_decay"], set()).update(names[id(p)] for p in group["params"])
    return groups


def test_matrices_decay_and_nothing_else():
    model = model_of_every_kind()
    groups = groups_by_name(model, build_optimizer(model, lr=1e-3, weight_decay=0.1))
    assert {name for name in groups[0.1] if "query." in name} == {name for name in DECAYED if "query." in name}
    assert groups[0.1] == DECAYED
    assert groups[0.0] == {name for name, _ in model.named_parameters()} - DECAYED
    assert {"embed.weight", "blocks.0.ffn.sub_keys", "blocks.0.ffn.w_in", "blocks.0.ffn.query_norm.weight"} <= groups[
        0.0
    ]


def test_tables_norms_and_biases_of_a_pre_trained_decoder_do_not_decay_and_its_head_does():
    mixer = {"kind": "attention", "num_heads": 2, "bias": "all", "qk_norm": "head"}
    block = {"kind": "block", "mixer": mixer, "ffn": {"kind": "dense", "d_ff": 6, "bias": True}}
    sizes = {"d_model": 8, "vocab_size": 17, "seq_len": 9, "blocks": [block]}
    model = build_model(sizes | {"norm": "layer", "tie_embeddings": False, "learned_positions": 9})
    groups = groups_by_name(model, build_optimizer(model, lr=1e-3, weight_decay=0.1))
    linear = {f"blocks.0.mixer.{name}.weight" for name in "qkvo"} | {f"blocks.0.ffn.{name}" for name in FEED}
    assert groups[0.1] == {"lm_head.weight"} | linear
    assert not set(names_of(model, [p for of in split(model, "muon").matrices.values() for p in of])) & {
        "lm_head.weight",
        "positions.weight",
    }


def names_of(model, parameters):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def test_decay_shrinks_a_matrix_without_gradient_and_leaves_a_norm():
    model = model_of_every_kind()
    matrix, norm = model.blocks[2].mixer.q.weight, model.norm.weight
    before = matrix.detach().clone()
    for parameter in (matrix, norm):
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(matrix.detach(), before * 0.95)
    assert torch.equal(norm.detach(), torch.ones_like(norm))


def test_frozen_parameters_are_left_out():
    model = model_of_every_kind()
    model.embed.requires_grad_(False)
    groups = groups_by_name(model, build_optimizer(model, lr=1e-3))
    assert "embed.weight" not in groups[0.0] | groups[0.1]


def test_the_rate_warms_up_peaks_once_and_ends_at_its_floor():
    shares = [schedule(step, 100, 10) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 11)
    assert shares[9] == pytest.approx(10 / 11)
    assert shares[10] == max(shares) == 1
    assert shares[100] == min(shares[10:]) == pytest.approx(0.1)
    assert shares[55] == pytest.approx(0.55)
    assert all(a < b for a, b in pairwise(shares[:11]))
    assert all(a > b for a, b in pairwise(shares[10:]))


def test_a_schedule_without_warm_up_starts_at_its_peak_and_the_floor_is_a_setting():
    assert schedule(0, 7, 0) == 1
    assert schedule(7, 7, 0, floor=0) == pytest.approx(0)
    assert schedule(1, 1, 1) == 1


def test_two_stages_are_one_line_that_drops_by_a_third_at_half_of_the_run():
    shares = [schedule(step, 100, 10, shape="two_stage") for step in range(101)]
    assert shares[:10] == [schedule(step, 100, 10) for step in range(10)]
    assert shares[10] == max(shares) == 1
    steps = [b - a for a, b in pairwise(shares[10:50])]
    assert steps == pytest.approx([-0.9 / 90] * 39)
    assert shares[50] == pytest.approx(2 / 3 * (1 - 0.9 * 40 / 90))
    assert shares[49] / shares[50] > 1.5
    assert [b - a for a, b in pairwise(shares[50:])] == pytest.approx([-2 / 3 * 0.9 / 90] * 50)
    assert shares[100] == pytest.approx(2 / 3 * 0.1)
    assert [second_stage(step, 7) for step in range(7)] == [False] * 4 + [True] * 3


def test_the_stacked_norms_of_ternary_experts_do_not_decay():
    layer = build_layer(MOE | {"precision": "ternary"}, 8)
    groups = groups_by_name(layer, build_optimizer(layer, lr=1e-3, weight_decay=0.1))
    assert groups[0.0] == {"experts.sub_norm", "shared.sub_norm.weight"}


def test_predictors_are_clipped_apart_from_the_trunk():
    model = model_of_every_kind()
    trunk, predictors = clip_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in predictors} == {
        f"blocks.3.predictor.{part}.{name}" for part in ("up", "down") for name in ("weight", "bias")
    }
    assert len(trunk) + len(predictors) == len(names) == len({id(p) for p in (*trunk, *predictors)})


def test_a_model_without_predictors_has_one_clip_group():
    model = build_model({"d_model": 8, "vocab_size": 17, "seq_len": 9, "blocks": [block(PEER)]})
    assert [len(group) for group in clip_groups(model)] == [len(list(model.parameters()))]
