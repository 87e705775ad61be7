"""Sweeps of learning rates: extended until the best is interior, and no further."""

from math import inf, log

import pytest

from sparsemix.sweep.rates import MAX_RATES, best, described, interior, sweep


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
