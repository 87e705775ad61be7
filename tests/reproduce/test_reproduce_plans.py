"""Every reproduction plans from cost alone at every scale, and names what the papers' tables name."""

import pytest

from sparsemix.config import ConfigError
from sparsemix.model import LM
from sparsemix.reproduce.base import SCALES
from sparsemix.reproduce.entries import entries, entry
from sparsemix.reproduce.lab import ReproduceConfig, plan

NAMES = list(entries())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_needs_no_model_and_says_its_flops(name, scale, monkeypatch):
    monkeypatch.setattr(LM, "__init__", lambda *_: pytest.fail("a model was built"))
    planned = plan(name, ReproduceConfig(scale=scale))
    assert planned.flops > 0
    assert {cell.arm for cell in planned.cells} == {arm.name for arm in planned.design.arms}
    assert all(cell.config.steps >= 1 for cell in planned.cells)


def test_a_budget_and_seeds_overrule_the_scale():
    usual, given = plan("mod-capacity", ReproduceConfig()), plan("mod-capacity", ReproduceConfig(budget=1e11, seeds=2))
    assert given.flops == pytest.approx(usual.flops * 1e11 / usual.scale.budget / usual.scale.seeds * 2)
    assert {cell.config.seed for cell in given.cells} == {0, 1}


def test_runs_that_try_learning_rates_are_in_the_plan():
    planned = plan("ternary-gap", ReproduceConfig())
    arms, budget = len(planned.design.arms), planned.scale.budget
    assert planned.trials == 2 * arms
    assert planned.flops == pytest.approx((len(planned.cells) + 2 * arms) * budget, rel=0.01)
    assert plan("mod-capacity", ReproduceConfig()).trials == 0


def test_an_unknown_name_has_a_neighbour():
    with pytest.raises(ConfigError, match="did you mean 'mod-capacity'"):
        entry("mod-capacit")
