"""FLOPs, budget and time at equal loss, against what planted laws say."""

from dataclasses import replace

import numpy as np
import pytest
from made_records import DENSE, MOE, Law, made_study
from scipy.optimize import brentq

from sparsemix.report.fits.curves import curves_of
from sparsemix.report.isoflop import analyse

BUDGETS = (1e13, 3e13)


def entries(records, arm="moe", resamples=400):
    return [q for q in analyse(records, resamples=resamples)["quantities"] if q["arm"] == arm]


def forward_ratio(law, base, budget):
    best, nats = base.best(budget)
    own = brentq(lambda n: law.loss(n, law.tokens(n, budget)) - nats, law.best(budget)[0] / 50, law.best(budget)[0])
    return own / law.sparsity / best


def multiplier(law, base, budget):
    nats = law.best(budget)[1]
    return brentq(lambda c: base.best(c)[1] - nats, budget / 20, budget * 20) / budget


@pytest.fixture(scope="module")
def exact():
    return entries(made_study({"dense": DENSE, "moe": MOE}, BUDGETS, num_sizes=7, step=1.5, sd=1e-6))


def test_ratios_without_noise_are_the_planted_ones(exact):
    for entry in exact:
        assert entry["forward_ratio"] == pytest.approx(forward_ratio(MOE, DENSE, entry["budget"]), rel=0.05)
        assert entry["flop_multiplier"] == pytest.approx(multiplier(MOE, DENSE, entry["budget"]), rel=0.02)


def test_seconds_follow_the_budget_that_the_baseline_would_need(exact):
    for entry in exact:
        # Made runs take FLOPs over speed, so seconds grow as the budget.
        expected = entry["flop_multiplier"] * MOE.speed / DENSE.speed
        assert entry["wall_multiplier"] == pytest.approx(expected, rel=1e-3)


def test_steps_per_second_of_the_equal_loss_pair(exact):
    for entry in exact:
        expected = MOE.speed / DENSE.speed / entry["forward_ratio"]
        assert entry["steps_per_s_ratio"] == pytest.approx(expected, rel=0.02)


def slowed(records, seed, sd=0.2):
    """The same runs on a machine that is more or less busy."""
    factors = np.exp(np.random.default_rng(seed).normal(0, sd, len(records)))
    pairs = zip(records, factors, strict=True)
    return [replace(r, wall_s=r.wall_s * f, tokens_per_s=r.tokens_per_s / f) for r, f in pairs]


def test_intervals_of_times_hold_what_a_busy_machine_does():
    missed = dict.fromkeys(("steps_per_s_ratio", "wall_multiplier"), 0)
    for seed in range(10):
        quiet = made_study({"dense": DENSE, "moe": MOE}, BUDGETS, seed=seed, rates=False)
        for entry in entries(slowed(quiet, seed)):
            budget, speed = entry["budget"], MOE.speed / DENSE.speed
            planted = {"steps_per_s_ratio": speed / forward_ratio(MOE, DENSE, budget)}
            planted |= {"wall_multiplier": multiplier(MOE, DENSE, budget) * speed}
            for name, value in planted.items():
                low, high = entry[f"{name}_ci"]
                missed[name] += not low <= value <= high
                # Two runs differ by 0.28 in ln seconds: less than that cannot be known of their ratio.
                assert np.log(high / low) > 0.4
    assert max(missed.values()) <= 4  # of 20


def test_an_arm_that_is_the_baseline_has_multiplier_one():
    for entry in entries(made_study({"dense": DENSE, "moe": DENSE}, BUDGETS, sd=0.005)):
        assert entry["flop_multiplier_ci"][0] < 1 < entry["flop_multiplier_ci"][1]
        assert entry["flop_multiplier"] == pytest.approx(1, abs=0.05)


def test_an_arm_that_never_reaches_the_loss_has_no_ratio_but_a_multiplier_below_one():
    for entry in entries(made_study({"dense": DENSE, "moe": Law(A=130.0)}, BUDGETS, sd=0.003)):
        assert entry["forward_ratio"] is None and entry["steps_per_s_ratio"] is None
        assert entry["flop_multiplier_ci"][1] < 1


def test_one_budget_has_no_multiplier():
    (entry,) = entries(made_study({"dense": DENSE, "moe": MOE}, (1e13,)))
    assert entry["flop_multiplier"] is None and entry["wall_multiplier"] is None
    assert entry["forward_ratio"] is not None


def test_multipliers_are_the_same_in_bits():
    """What has the unit of a loss scales with it, and what is a ratio does not change."""
    # Five sizes: which far ones are left out is a rule in nats.
    study = made_study({"dense": DENSE, "moe": MOE}, BUDGETS, num_sizes=5)
    scale = 1 / np.log(2)
    bits = [replace(r, nats=r.nats * scale) for r in study]
    for one, other in zip(entries(study), entries(bits), strict=True):
        for name in ("flop_multiplier", "wall_multiplier", "forward_ratio", "optimal_params", "gap_percent"):
            assert other[name] == pytest.approx(one[name], rel=1e-9)
        assert other["gap_nats"] == pytest.approx(one["gap_nats"] * scale, rel=1e-9)
        assert other["gap_bpb"] == pytest.approx(one["gap_bpb"], rel=1e-9)


def test_intervals_hold_the_planted_values():
    missed = dict.fromkeys(("forward_ratio", "flop_multiplier", "gap_nats", "nats", "optimal_params"), 0)
    for seed in range(10):
        for entry in entries(made_study({"dense": DENSE, "moe": MOE}, BUDGETS, seed=seed, rates=False)):
            budget = entry["budget"]
            params, nats = MOE.best(budget)
            planted = {"nats": nats, "optimal_params": params, "gap_nats": nats - DENSE.best(budget)[1]}
            planted |= {"forward_ratio": forward_ratio(MOE, DENSE, budget)}
            planted |= {"flop_multiplier": multiplier(MOE, DENSE, budget)}
            for name, value in planted.items():
                low, high = entry[f"{name}_ci"]
                missed[name] += not low <= value <= high
    assert max(missed.values()) <= 4  # of 20; 1 is expected, 5 in less than 3 studies of 1000


def test_between_sizes_a_quantity_is_a_power_law_of_the_flops():
    study = made_study({"dense": DENSE}, (1e13,), rates=False)
    (curve,) = curves_of(study, ["dense"], 0.4)
    for x in (4.5, 5.37, 6.4):
        assert curve.params_at(x) == pytest.approx(10**x / 2, rel=1e-4)


def test_a_third_budget_uses_the_joint_law():
    study = made_study({"dense": DENSE, "moe": MOE}, (1e13, 3e13, 1e14), sd=0.002, rates=False)
    for entry in entries(study, resamples=2):
        assert entry["flop_multiplier"] == pytest.approx(multiplier(MOE, DENSE, entry["budget"]), rel=0.03)
