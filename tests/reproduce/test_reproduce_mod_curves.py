"""Figures of isoFLOP curves: their claims follow planted optima, and their tables and charts are whole."""

import math

import pytest
from made_mod_runs import made_grid
from test_reproduce_mod import TINY

from sparsemix.config import parse
from sparsemix.data import DataConfig
from sparsemix.reproduce import mod_callouts
from sparsemix.reproduce.base import Lab
from sparsemix.reproduce.lab import reproduction
from sparsemix.reproduce.mod_arms import FAMILY, forward_flops
from sparsemix.reproduce.mod_curves import analysis_of, at_optimum, ratio, relative
from sparsemix.reproduce.mod_speed import Speed
from sparsemix.sweep.grid import Grid

WIDTHS = (20, 24, 32, 40, 48, 64)
BUDGET = 2e9
SCALE = TINY._replace(budget=BUDGET, budgets=(BUDGET,))
# (loss at the optimum, FLOPs of the optimal size over the dense one's) of each arm; the dense one lies at width 32.
PLANTED = {
    "dense": (3.14, 1.0), "MoD 12.5 %": (3.08, 1.05), "MoD 50 %": (3.11, 1.05), "random 50 %": (3.2, 1.05),
    "MoE": (3.10, 1.0), "staged MoDE": (3.05, 1.05),
}  # fmt: skip
REVERSED = {
    "dense": (3.14, 1.0), "MoD 12.5 %": (3.2, 0.8), "MoD 50 %": (3.19, 0.8), "random 50 %": (3.1, 0.8),
    "MoE": (3.16, 1.0), "staged MoDE": (3.2, 0.8),
}  # fmt: skip


def lab_of(name, out, optima, monkeypatch, faster=1.7):
    """A curve of every arm of a design: nats = best + 0.5 log10^2 of FLOPs per token over the optimal ones."""
    arms = reproduction(name).design(SCALE).arms
    grid = Grid(f"{FAMILY}:300k", SCALE.overrides)
    data = parse(DataConfig, {"vocab_size": 300})
    dense = forward_flops(grid.config(arms[0], 32, data, BUDGET))
    runs = {}
    for arm in arms:
        best, share = optima[arm.name]

        def loss(config, best=best, share=share):
            return best + 0.5 * math.log10(forward_flops(config) / (dense * share)) ** 2

        configs = [grid.config(arm, width, data, BUDGET) for width in WIDTHS]
        runs[arm.name] = made_grid(out, arm, configs, loss, ahead=0.002 if arm.kind.startswith("mod") else None)
    seconds = {"#1": 1.0, "#2": 1.5, "#3": 1 / faster, "#4": 1.0}
    times = Speed({model: [s * (1 + 0.01 * (i % 3)) for i in range(12)] for model, s in seconds.items()}, "a machine")
    monkeypatch.setattr(mod_callouts, "step_times", lambda *_: times)
    return Lab(SCALE, out, runs, lambda _: None)


@pytest.mark.parametrize("name", ["mod-fig3", "mod-fig4", "mod-fig6", "mod-fig7"])
def test_planted_optima_reproduce_the_figure(tmp_path, monkeypatch, name):
    outcome = reproduction(name).outcome(lab_of(name, tmp_path, PLANTED, monkeypatch))
    assert {trend.outcome for trend in outcome.trends} == {"reproduced"}, outcome.trends
    for table in outcome.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    for figure in outcome.figures:
        assert figure.svg().startswith("<svg")


@pytest.mark.parametrize(("name", "claims"), [("mod-fig3", 3), ("mod-fig4", 1), ("mod-fig6", 1), ("mod-fig7", 3)])
def test_reversed_optima_do_not(tmp_path, monkeypatch, name, claims):
    lab = lab_of(name, tmp_path, REVERSED, monkeypatch, faster=0.9)
    trends = reproduction(name).outcome(lab).trends
    assert [trend.outcome for trend in trends].count("not reproduced") >= claims
    assert "reproduced" not in {trend.outcome for trend in trends if "better" in trend.claim}


@pytest.mark.parametrize("name", ["mod-fig3", "mod-fig7"])
def test_equal_optima_resolve_no_order(tmp_path, monkeypatch, name):
    lab = lab_of(name, tmp_path, dict.fromkeys(PLANTED, (3.14, 1.0)), monkeypatch)
    said = {t.outcome for t in reproduction(name).outcome(lab).trends if "better" in t.claim or "worse" in t.claim}
    assert said == {"not resolved at this scale"}


def test_an_optimum_beyond_the_sizes_resolves_nothing_that_it_could_change(tmp_path, monkeypatch):
    beyond = PLANTED | {"dense": (3.14, 0.2)}
    trends = reproduction("mod-fig4").outcome(lab_of("mod-fig4", tmp_path, beyond, monkeypatch)).trends
    assert {trend.outcome for trend in trends} == {"not resolved at this scale"}
    assert all("bracketed" in trend.evidence or "dense: " in trend.evidence for trend in trends)


def test_call_outs_are_the_models_that_the_figure_points_at(tmp_path, monkeypatch):
    lab = lab_of("mod-fig3", tmp_path, PLANTED, monkeypatch)
    found = reproduction("mod-fig3").outcome(lab).numbers["callouts"]
    dense, mod = (at_optimum(lab.runs[arm], BUDGET)[0] for arm in ("dense", "MoD 12.5 %"))
    assert (found["#1"]["params"], found["#4"]["params"]) == (dense.params, mod.params)
    assert found["#3"]["flops_per_step"] < found["#1"]["flops_per_step"] < found["#2"]["flops_per_step"]


def test_a_ratio_of_optima_has_the_error_of_both():
    one = {"params": 4e6, "params_ci": [4e6 / 2, 4e6 * 2]}
    other = {"params": 2e6, "params_ci": [2e6 / 1.5, 2e6 * 1.5]}
    estimate, (low, high) = ratio(one, other, "params")
    assert estimate == 2.0 and high / 2 == pytest.approx(2 / low)
    assert math.log(high / 2) ** 2 == pytest.approx(math.log(2) ** 2 + math.log(1.5) ** 2)
    assert ratio(one, {"params": 2e6, "params_ci": [None, None]}, "params") == (2.0, None)
    assert ratio(None, other, "params") == (None, None)


def test_losses_are_relative_to_the_dense_optimum(tmp_path, monkeypatch):
    lab = lab_of("mod-fig6", tmp_path, PLANTED, monkeypatch)
    points = relative(analysis_of(lab), lab.runs["dense"], BUDGET, lambda r: r.nats)
    assert min(loss for _, loss in points) == pytest.approx(1.0, abs=2e-3)
    assert min(points, key=lambda point: point[1])[0] == pytest.approx(1.0, rel=0.15)
