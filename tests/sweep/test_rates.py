"""Sweeps of learning rates: extended until the best is interior, and no further."""

from math import inf, log

import pytest

from sparsemix.sweep.rates import MAX_RATES, best, described, interior, sweep, vertex


def swept(optimum, centre=0.01):
    asked = []

    def train(pairs):
        asked.extend(pairs)
        return [abs(log(rate / optimum)) for _, rate in pairs]

    return sweep({"a": centre}, train)["a"], [rate for _, rate in asked]


@pytest.mark.parametrize("times", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_a_sweep_ends_with_its_best_rate_inside(times):
    tried, asked = swept(0.01 * times)
    assert best(tried) == pytest.approx(0.01 * times) and interior(tried)
    # Three at first, then one for each step that the best is away from the middle.
    assert sorted(tried) == sorted(asked) and len(asked) == 3 + round(abs(log(times) / log(2)))


def test_a_best_rate_out_of_reach_ends_the_sweep_and_is_said():
    tried, _ = swept(1e9)
    assert len(tried) == MAX_RATES and not interior(tried)
    assert "at an end" in described(tried)
    assert described(swept(0.01)[0]) == "0.01 of 0.005, 0.01, 0.02"


def test_names_are_swept_side_by_side_and_failed_rates_are_worst():
    rounds = []

    def train(pairs):
        rounds.append(pairs)
        return [inf if rate > 0.015 else -rate for _, rate in pairs]

    found = sweep({"a": 0.01, "b": 0.02}, train)
    assert [len(pairs) for pairs in rounds] == [6, 1]
    assert best(found["a"]) == best(found["b"]) == 0.01
    assert "every run failed" in described({0.1: inf, 0.2: inf, 0.4: inf})


def test_the_vertex_of_a_planted_valley_is_its_bottom_to_half_a_step():
    for bottom in (0.01, 0.0117, 0.0141, 0.019):
        losses = {0.01 * 2.0**i: log(0.01 * 2.0**i / bottom) ** 2 for i in (-2, -1, 0, 1, 2)}
        assert abs(log(vertex(losses) / bottom)) <= log(2) / 4 + 1e-9
    # A rate that was tried is the same number, so that its run serves twice.
    assert vertex({rate: log(rate / 0.02) ** 2 for rate in (0.005, 0.01, 0.02, 0.04)}) == 0.02


def test_noise_in_a_flat_valley_does_not_lead_to_its_edge():
    # The best of these is next to a rate at which training fails.
    flat = {0.005: 3.08, 0.01: 3.036, 0.02: 3.021, 0.04: 3.017, 0.08: 3.309}
    assert best(flat) == 0.04 and vertex(flat) == 0.02
    assert described(flat, vertex(flat)) == "0.02 of 0.005, 0.01, 0.02, 0.04, 0.08"


def test_losses_without_a_valley_have_their_best():
    assert vertex({0.01: 3.0, 0.02: 2.0, 0.04: 1.0}) == 0.04
    assert vertex({0.01: inf, 0.02: 2.0, 0.04: inf}) == 0.02
    assert vertex({0.01: 2.0, 0.02: 1.0, 0.04: inf}) == 0.02
