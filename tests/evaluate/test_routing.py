import math

import numpy as np
import pytest
import torch

from sparsemix import build_layer, update
from sparsemix.evaluate.routing import (
    activation,
    expert_details,
    expert_report,
    predictor_report,
    routing_report,
    spread,
    taken_report,
    unevenness,
    usage,
)
from sparsemix.layers import Ctx
from sparsemix.layers.router import usage_stats
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


def flat(report, path=""):
    """Every entry of a nested report by its path."""
    if not isinstance(report, dict):
        return {path: report}
    return {name: value for key, part in report.items() for name, value in flat(part, f"{path}.{key}").items()}


@pytest.mark.parametrize("settings", [MOE, PEER, {**PEER, "gate": "relu"}], ids=["moe", "peer", "relu"])
def test_streaming_equals_one_shot(settings):
    layer = build_layer(settings, D).double()
    x = torch.randn(6, 9, D, dtype=torch.float64)
    update(layer.train(), layer(x)[1].stats)
    layer.eval()
    whole = layer(x, Ctx(causal=True))[1].stats
    parts = [layer(part, Ctx(causal=True))[1].stats for part in x.split([1, 2, 3])]
    reports = []
    for stats in (
        whole,
        {name: sum(part[name] for part in parts) for name in ("counts", "gate_mass", "gate_histogram")},
    ):
        summed = [stats[name].numpy() for name in ("counts", "gate_mass", "gate_histogram")]
        reports.append(flat(expert_details(*summed, tokens=54, rows=54)))
    assert reports[0] == {name: pytest.approx(value, rel=1e-11, abs=1e-11) for name, value in reports[1].items()}
    assert len(reports[0]) > 30
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
        layer.sub_keys.fill_(-1.0)
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


@pytest.mark.parametrize("n", [1, 7, 1024])
def test_an_even_spread_and_a_single_expert_are_the_two_ends_of_every_measure(n):
    even, single = spread(np.full(n, 2.5)), spread(np.eye(n)[n // 2] * 9)
    assert even["unevenness"] == pytest.approx(0, abs=1e-12) and single["unevenness"] == pytest.approx(math.log(n))
    assert even["effective"] == pytest.approx(n) and single["effective"] == pytest.approx(1)
    assert even["entropy"] == pytest.approx(math.log(n)) and single["entropy"] == pytest.approx(0, abs=1e-12)
    assert even["normalised_entropy"] == pytest.approx(1)
    assert n == 1 or single["normalised_entropy"] == pytest.approx(0, abs=1e-12)
    assert even["max_over_mean"] == pytest.approx(1) and single["max_over_mean"] == pytest.approx(n)
    assert even["gini"] == pytest.approx(0, abs=1e-12) and single["gini"] == pytest.approx(1 - 1 / n)
    assert even["cover"] == {str(share): math.ceil(n * share / 100) for share in (50, 90, 99)}
    assert single["cover"] == {"50": 1, "90": 1, "99": 1}


def test_a_hand_made_spread():
    of = spread(np.array([0.0, 1.0, 1.0, 2.0]))
    assert of["entropy"] == pytest.approx(1.5 * math.log(2)) and of["effective"] == pytest.approx(2**1.5)
    assert of["normalised_entropy"] == pytest.approx(0.75) and of["max_over_mean"] == 2
    # The mean absolute difference of all pairs over twice the mean, which is 1.
    pairs = [abs(a - b) for a in (0, 1, 1, 2) for b in (0, 1, 1, 2)]
    assert of["gini"] == pytest.approx(sum(pairs) / 16 / 2)
    assert of["cover"] == {"50": 1, "90": 3, "99": 3}


def test_no_mass_has_no_spread():
    assert set(spread(np.zeros(3)).values()) == {None}


def test_an_expert_is_active_above_a_threshold_not_at_it():
    found = activation(np.array([0.0, 1.0, 10.0, 100.0]), tokens=1000, rows=4000)
    # Picks a token are 0, 0.001, 0.01 and 0.1; a row, a quarter of these.
    assert found["stated"] == {"0.0001": [0.75, 0.75], "0.001": [0.5, 0.5], "0.01": [0.25, 0.25], "0.1": [0.0, 0.0]}
    assert len(found["thresholds"]) == len(found["per_token"]) == len(found["per_row"]) == 41
    assert (np.diff(found["per_token"]) <= 0).all() and (np.array(found["per_row"]) <= found["per_token"]).all()


def test_sub_tokens_raise_the_activation_per_token_and_not_per_row():
    counts = np.array([3.0, 30.0, 300.0])
    whole, split = activation(counts, 1000, 1000), activation(4 * counts, 1000, 4000)
    assert split["per_row"] == whole["per_token"] != split["per_token"]


def test_few_visits_make_usage_a_lower_bound():
    few, enough = (
        expert_details(np.full(8, visits), np.ones(8), np.zeros(20), tokens=40, rows=40) for visits in (9.0, 10.0)
    )
    assert few["lower_bound"] and not enough["lower_bound"]
    assert few["visits_per_expert"] == 9 and few["picks_per_token"] == 72 / 40


def test_tokens_taken_by_none_one_and_several():
    report = taken_report(np.array([10.0, 20.0, 6.0, 4.0]))
    assert report["none"] == 0.25 and report["one"] == 0.5 and report["several"] == 0.25
    assert report["mean"] == pytest.approx((20 + 12 + 12) / 40) and report["histogram"] == [10, 20, 6, 4]
    assert taken_report(np.array([5.0]))["one"] == 0


@pytest.mark.parametrize("padded", [False, True])
def test_gate_histogram_and_top_gate_are_those_of_a_loop_over_picks(padded):
    gates = torch.tensor([[0.0, 0.049, 0.051], [0.5, 1.0, 1.7], [-0.3, 0.999, 0.2]])
    valid = torch.tensor([True, False, True]) if padded else None
    stats = usage_stats(torch.tensor([[0, 1, 2]] * 3), gates, 4, valid)
    expected = [0.0] * 20
    for n, row in enumerate(gates.tolist()):
        for gate in row:
            if valid is None or valid[n]:
                expected[min(19, max(0, math.floor(gate * 20)))] += 1
    assert stats["gate_histogram"].tolist() == expected and stats["gate_histogram"].dtype == torch.float64
    assert stats["top_gate"].tolist() == pytest.approx([0.051, 0.0 if padded else 1.7, 0.999])
