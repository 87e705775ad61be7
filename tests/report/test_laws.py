"""Joint laws and granularity: planted parameters come back, exactly without noise."""

import numpy as np
import pytest
from made_records import ARMS, DENSE, made_record, made_study

from sparsemix.report.fits.bootstrap import runs_of
from sparsemix.report.fits.curves import curves_of
from sparsemix.report.fits.granularity import (
    grains_of,
    granularity_laws,
    granularity_warnings,
    projection,
    without_embeddings,
)
from sparsemix.report.fits.laws import NAMES, JointLaw, budget_for, fit_huber, fit_varpro, joint_law, laws_of

CHINCHILLA = JointLaw(1.69, 406.4, 410.7, 0.34, 0.28)


def grid(law, budgets, num_sizes=7, step=2.0):
    """(params, tokens) of ladders around each budget's optimum."""
    params = np.concatenate([law.best(b)[0] * step ** (np.arange(num_sizes) - num_sizes // 2) for b in budgets])
    return params, np.repeat(budgets, num_sizes) / (6 * params)


@pytest.mark.parametrize("law", [JointLaw(DENSE.E, DENSE.A, DENSE.B, DENSE.alpha, DENSE.beta), CHINCHILLA])
def test_both_methods_are_exact_without_noise(law):
    params, tokens = grid(DENSE, (1e13, 3e13, 1e14, 3e14))
    nats = law.loss(params, tokens)
    for fit, rel in ((fit_varpro, 1e-6), (fit_huber, 1e-3)):
        found = fit(params, tokens, nats)
        for name in NAMES:
            assert getattr(found, name) == pytest.approx(getattr(law, name), rel=rel)


def test_noisy_laws_are_recovered_within_stated_tolerance():
    rng = np.random.default_rng(0)
    params, tokens = grid(DENSE, (1e13, 3e13, 1e14, 3e14))
    for fit in (fit_varpro, fit_huber):
        found = fit(params, tokens, DENSE.loss(params, tokens) + rng.normal(0, 0.005, len(params)))
        assert abs(found.E - DENSE.E) < 0.06
        assert found.alpha == pytest.approx(DENSE.alpha, abs=0.02)
        assert found.beta == pytest.approx(DENSE.beta, abs=0.02)
        assert abs(found.A / DENSE.A - 1) < 0.2 and abs(found.B / DENSE.B - 1) < 0.2


def test_huber_ignores_a_broken_run_and_least_squares_does_not():
    params, tokens = grid(DENSE, (1e13, 3e13, 1e14, 3e14))
    nats = DENSE.loss(params, tokens)
    nats[3] += 0.5
    assert abs(fit_huber(params, tokens, nats).E - DENSE.E) < 0.005
    assert abs(fit_varpro(params, tokens, nats).E - DENSE.E) > 0.05


def test_the_scale_of_the_loss_does_not_change_hubers_minimum():
    rng = np.random.default_rng(1)
    params, tokens = grid(DENSE, (1e13, 3e13, 1e14))
    nats = DENSE.loss(params, tokens) + rng.normal(0, 0.01, len(params))
    found, bits = fit_huber(params, tokens, nats), fit_huber(params, tokens, nats / np.log(2))
    assert abs(bits.E * np.log(2) / found.E - 1) < 1e-4
    assert (bits.alpha, bits.beta) == pytest.approx((found.alpha, found.beta), rel=1e-4)


def test_losses_that_do_not_fall_have_no_law():
    params, tokens = grid(DENSE, (1e13, 3e13, 1e14))
    found = fit_varpro(params, tokens, 2 + 0.05 * np.log(params) + 0.05 * np.log(tokens))
    assert found is None or found.at_an_edge


def test_the_bootstraps_intervals_cover():
    inside = []
    for seed in range(24):
        study = made_study({"dense": DENSE}, (1e13, 3e13, 1e14), shared=0, seed=seed, rates=False)
        runs, clusters = runs_of(curves_of(study, ["dense"], 0.4))
        params, tokens, nats = (np.array([float(getattr(r, x)) for r in runs]) for x in ("params", "tokens", "nats"))
        (entry,) = joint_law("dense", params, tokens, nats, clusters, 50, ("varpro",))
        inside.append([entry["ci"][name][0] <= getattr(DENSE, name) <= entry["ci"][name][1] for name in NAMES])
    assert (np.mean(inside, axis=0) > 0.8).all()


def test_an_arm_of_three_budgets_gets_both_laws():
    study = made_study({"dense": DENSE}, (1e13, 3e13, 1e14), sd=0.005, rates=False)
    entries, said = laws_of(curves_of(study, ["dense"], 0.4), 40)
    assert [entry["method"] for entry in entries] == ["varpro", "huber"] and not said
    assert all(entry["num_runs"] == 30 and 0.002 < entry["rmse"] < 0.008 for entry in entries)
    assert all(entry["ci"][name][0] < entry[name] < entry["ci"][name][1] for entry in entries for name in NAMES)


def test_two_budgets_draw_no_law():
    study = [r for r in made_study({"dense": DENSE}) if r.role != "rate"]
    assert laws_of(curves_of(study, ["dense"], 0.4), 50) == ([], [])


def test_the_law_says_which_budget_has_a_loss():
    law = JointLaw(DENSE.E, DENSE.A, DENSE.B, DENSE.alpha, DENSE.beta)
    change = DENSE.best(4e13)[1] - DENSE.best(1e13)[1]
    forward = lambda logs: 2 * 10**logs  # noqa: E731
    assert budget_for(law, forward, (1e5, 1e6), 1e13, change) == pytest.approx(4e13, rel=1e-3)
    assert np.isnan(budget_for(law, forward, (1e5, 1e6), 1e13, -10.0))


def fine_grained(record, granularity):
    """The loss of arXiv:2402.07871 with its own coefficients for mixtures of experts."""
    size = without_embeddings(record)
    return 0.47 + (2.1 / granularity**0.58 + 18.1) / size**0.115 + 30.8 / record.tokens**0.147


def test_granularity_is_recovered_and_needs_three_granularities():
    runs = []
    for granularity in (1, 2, 4, 8):
        for budget in (1e14, 1e15, 1e16):
            for params in (4e6, 1e7, 3e7):
                blank = made_record("moe", budget, params, 0, 3.0, ARMS["moe"], top_k=granularity)
                nats = fine_grained(blank, granularity)
                runs.append(made_record("moe", budget, params, 0, nats, ARMS["moe"], top_k=granularity))
    (entry,) = granularity_laws(runs, 20)
    planted = {"c": 0.47, "g": 2.1, "a": 18.1, "b": 30.8, "gamma": 0.58, "alpha": 0.115, "beta": 0.147}
    for name, value in planted.items():
        assert entry[name] == pytest.approx(value, rel=1e-3)
    assert entry["arm"] == "moe" and entry["granularities"] == [1, 2, 4, 8]
    assert "2 to 16 experts" in granularity_warnings([entry])[0]
    assert granularity_warnings([entry | {"expansions": [64.0]}]) == []
    for name, limit in (("gamma", 0.05), ("beta", 1.5), ("g", 0.0)):
        (said,) = granularity_warnings([entry | {"expansions": [64.0], name: limit}])
        assert "do not tell" in said
    assert granularity_laws([r for r in runs if grains_of(r).granularity < 4], 20) == []


def test_granularity_counts_the_experts_of_a_token():
    assert grains_of(made_record("moe", 1e13, 1e6, 0, 3.0, ARMS["moe"], top_k=4)) == ("moe", 4, 4)
    assert grains_of(made_record("peer", 1e13, 1e6, 0, 3.0, ARMS["peer"], top_k=4)) == ("peer", 16, 256)
    assert grains_of(made_record("dense", 1e13, 1e6, 0, 3.0, DENSE)) is None


def test_negative_terms_are_not_fitted():
    params, tokens = np.geomspace(1e6, 1e8, 12), np.geomspace(1e8, 1e10, 12)[::-1].copy()
    coefs, _ = projection(params, tokens, np.tile([1.0, 2.0, 4.0, 8.0], 3)).fits((1 + 1e-3 * params**0.3)[None])
    assert np.isnan(coefs).all() or (coefs >= 0).all()
