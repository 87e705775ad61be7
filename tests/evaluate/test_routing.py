import math

import numpy as np
import pytest
import torch

from sparsemix import build_layer, update
from sparsemix.evaluate.routing import expert_report, predictor_report, routing_report, unevenness, usage
from sparsemix.layers import Ctx
from tiny import MOE, PEER, D


def test_even_use_has_unevenness_zero_and_one_expert_ln_n():
    for n in (1, 7, 65536):
        assert unevenness(np.full(n, 3.5)) == pytest.approx(0.0, abs=1e-12) and usage(np.full(n, 3.5)) == 1
        single = np.zeros(n)
        single[n // 2] = 41.0
        assert unevenness(single) == pytest.approx(math.log(n), abs=1e-12) and usage(single) == 1 / n


def test_unevenness_is_the_kl_divergence_from_even_use():
    z = np.array([0.5, 0.25, 0.25, 0.0])
    expected = 0.5 * math.log(0.5 / 0.25)
    assert unevenness(1000 * z) == pytest.approx(expected, rel=1e-12)
    assert usage(1000 * z) == 0.75


def test_unevenness_without_any_mass_is_not_a_number():
    assert math.isnan(unevenness(np.zeros(4))) and usage(np.zeros(4)) == 0


@pytest.mark.parametrize("settings", [MOE, PEER, {**PEER, "gate": "relu"}], ids=["moe", "peer", "relu"])
def test_streaming_equals_one_shot(settings):
    layer = build_layer(settings, D).double()
    x = torch.randn(6, 9, D, dtype=torch.float64)
    update(layer.train(), layer(x)[1].stats)
    layer.eval()
    whole = layer(x, Ctx(causal=True))[1].stats
    parts = [layer(part, Ctx(causal=True))[1].stats for part in x.split([1, 2, 3])]
    reports = []
    for stats in (whole, {name: sum(part[name] for part in parts) for name in ("counts", "gate_mass")}):
        reports.append(expert_report(stats["counts"].numpy(), stats["gate_mass"].numpy(), 54))
    assert reports[0] == {name: pytest.approx(value, rel=1e-12) for name, value in reports[1].items()}
    assert whole["counts"].sum() == 54 * (2 if settings is MOE else 8)


def test_usage_is_weighted_by_gates_and_the_load_by_counts():
    counts, gate_mass = np.array([10.0, 10.0, 10.0, 10.0]), np.array([4.0, 0.0, 0.0, 0.0])
    report = expert_report(counts, gate_mass, tokens=20)
    assert report["usage"] == 0.25 and report["picked"] == 1.0
    assert report["unevenness"] == pytest.approx(math.log(4)) and report["load"] == [0.25] * 4
    swapped = expert_report(gate_mass, counts, tokens=20)
    assert swapped["usage"] == 1.0 and swapped["picked"] == 0.25
    assert swapped["unevenness"] == pytest.approx(0.0, abs=1e-12) and swapped["load"] == [1.0, 0.0, 0.0, 0.0]


def test_a_relu_gate_of_zero_is_a_pick_but_no_use():
    layer = build_layer({**PEER, "gate": "relu", "query_norm": "layer"}, D).eval()
    # Far apart from all queries' directions: every score of the picks is negative or positive by the sign of the keys.
    with torch.no_grad():
        layer.query_norm.weight.zero_()
        layer.query_norm.bias.fill_(1.0)
        layer.keys.fill_(-1.0)
    stats = layer(torch.randn(1, 5, D))[1].stats
    report = expert_report(stats["counts"].numpy(), stats["gate_mass"].numpy(), 5)
    assert report["usage"] == 0 and report["picked"] > 0 and math.isnan(report["unevenness"])


@pytest.mark.parametrize("n", [1, 8, 200])
def test_a_short_load_curve_is_whole_sorted_and_sums_to_one(n):
    load = np.array(expert_report(np.random.default_rng(n).integers(1, 99, n), np.ones(n), 7)["load"])
    assert len(load) == n and (np.diff(load) <= 0).all() and load.sum() == pytest.approx(1.0, rel=1e-12)


def test_a_long_load_curve_keeps_evenly_spaced_ranks_and_both_ends():
    counts = np.arange(1.0, 10_001)
    load = np.array(expert_report(np.random.default_rng(0).permutation(counts), counts, 7)["load"]) * counts.sum()
    assert len(load) == 200 and load[0] == pytest.approx(10_000) and load[-1] == pytest.approx(1)
    steps = -np.diff(load)
    assert steps.min() >= 49 and steps.max() <= 52


def test_no_pick_at_all_is_a_load_of_zero():
    assert expert_report(np.zeros(3), np.zeros(3), 0)["load"] == [0.0, 0.0, 0.0]


def test_predictor_quality_of_a_hand_made_confusion():
    report = predictor_report(np.array([6.0, 2.0, 4.0, 28.0]))
    expected = {"accuracy": 34 / 40, "precision": 0.75, "recall": 0.6, "f1": 2 * 0.75 * 0.6 / 1.35}
    expected |= {"routed_rate": 8 / 40, "capacity": 10 / 40, "always_skip": 30 / 40}
    assert report == pytest.approx(expected, rel=1e-12)


def test_never_routing_is_87_5_percent_accurate_at_12_5_percent_capacity():
    report = predictor_report(np.array([0.0, 0.0, 128.0, 896.0]))
    assert report["accuracy"] == report["always_skip"] == 0.875 and report["capacity"] == 0.125
    assert report["precision"] == report["recall"] == report["f1"] == report["routed_rate"] == 0


def test_a_perfect_predictor_scores_one_and_no_token_scores_zero():
    report = predictor_report(np.array([128.0, 0.0, 0.0, 896.0]))
    assert report["accuracy"] == report["precision"] == report["recall"] == report["f1"] == 1
    assert set(predictor_report(np.zeros(4)).values()) == {0.0}


def test_the_report_is_keyed_by_layer_path():
    stats = {
        "blocks.0.ffn.counts": np.array([3.0, 1.0]),
        "blocks.0.ffn.gate_mass": np.array([1.0, 1.0]),
        "blocks.1.confusion": np.array([1.0, 0.0, 0.0, 1.0]),
    }
    report = routing_report(stats, np.array([1, 1]), tokens=2)
    assert set(report["experts"]) == {"blocks.0.ffn"} and set(report["predictor"]) == {"blocks.1"}
    assert report["passes"] == [1, 1] and report["experts"]["blocks.0.ffn"]["load"] == [0.75, 0.25]
    assert routing_report({}, None, 0) == {"passes": None, "predictor": {}, "experts": {}}
