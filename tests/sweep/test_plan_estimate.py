"""What a plan says of costs that were not measured."""

import pytest

from sparsemix.data import DataConfig
from sparsemix.sweep.arms import Arm
from sparsemix.sweep.estimate import Planned, Probe, between, totals
from sparsemix.sweep.grid import Grid, Ladders


def test_a_power_law_of_the_flops_is_met_between_and_beyond_its_ends():
    low, high = (Probe(f, 1e-9 * f**0.5, 1e-6 * f**0.25, round(1e3 * f**0.5)) for f in (1e8, 1e10))
    for flops in (1e7, 1e9, 4e10):
        found = between(low, high, flops)
        assert found.step_s == pytest.approx(1e-9 * flops**0.5)
        assert found.token_s == pytest.approx(1e-6 * flops**0.25)
        assert found.peak_bytes == pytest.approx(1e3 * flops**0.5, rel=1e-3)
    assert between(low, low, 1e8) == pytest.approx(low)


def test_totals_are_those_of_the_cells_the_seeds_and_the_rates():
    arms, data = [Arm("dense"), Arm("moe", "moe")], DataConfig()
    grid = Grid("tiny", budgets=(1e12, 3e12), seeds=4, rates="sweep")
    ladders = Ladders(arms, grid, data)
    cells = [
        Planned(arm.name, budget, r, 0.5, 10.0, 1e9)
        for arm in arms
        for budget in grid.budgets
        for r in ladders.first(arm, budget)
    ]
    line = totals(cells, ladders, 2)[0]
    # 2 kinds x 2 budgets x 5 sizes; 3 more seeds at 4 optima; 3 rates of 2 kinds at the smallest budget.
    assert line.startswith(
        "20 runs of one seed, 12 of other seeds at the optima, at least 6 for learning rates: 38 runs"
    )
    assert f"{(5 * 2 + 3 * 2) * 4e12 + 6 * 1e12:.3g} FLOPs" in line
    assert "about 3\u00a0min 10\u00a0s with 2 at a time" in line
    ladders.grid = grid._replace(size_seeds=3)
    line = totals(cells, ladders, 2)[0]
    assert line.startswith("60 runs of 3 seeds, 4 of other seeds at the optima, at least 6 for learning rates: 70 runs")
    assert f"{(15 * 2 + 2) * 4e12 + 6 * 1e12:.3g} FLOPs" in line
