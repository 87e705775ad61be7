"""Resampled losses: the spread of the residuals, clusters by seed, pairs across arms."""

from itertools import combinations

import numpy as np
import pytest
from made_records import made_study

from sparsemix.report.fits.bootstrap import percentiles, resampled, runs_of
from sparsemix.report.fits.curves import curves_of


@pytest.fixture(scope="module")
def clusters():
    study = [r for r in made_study(budgets=(1e13, 3e13), num_sizes=5) if r.role != "rate"]
    arms = list(dict.fromkeys(r.arm for r in study))
    return runs_of(curves_of(study, arms, 0.4))


def test_runs_of_one_budget_and_seed_at_the_optima_are_one_cluster(clusters):
    runs, names = clusters
    moved = resampled(np.zeros(len(runs)), np.ones(len(runs)), np.zeros(len(runs)), names, 200)
    for i, j in combinations(range(len(runs)), 2):
        seeds = runs[i].role == runs[j].role == "seed"
        together = seeds and (runs[i].budget, runs[i].seed) == (runs[j].budget, runs[j].seed)
        same = (moved[:, i] == moved[:, j]).all()
        assert same if together else (same == (names[i] == names[j]))


def test_runs_of_one_size_and_several_seeds_are_apart(clusters):
    runs, names = clusters
    for arm in ("dense", "moe"):
        own = [name for run, name in zip(runs, names, strict=True) if run.arm == arm]
        assert len(set(own)) == len(own)


def test_arms_fitted_apart_share_the_signs_of_shared_seeds():
    names = [("a", 1), ("a", 2), ("b", 1)]
    ones = np.ones(3)
    whole = resampled(0 * ones, ones, 0 * ones, names, 100)
    part = resampled(np.zeros(1), np.ones(1), np.zeros(1), names[2:], 100)
    assert np.array_equal(whole[:, 2], part[:, 0])
    assert not np.array_equal(whole[:, 0], whole[:, 1])
    assert not np.array_equal(whole, resampled(0 * ones, ones, 0 * ones, names, 100, seed=1))


def test_the_bootstraps_error_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 60)
    design = np.stack([np.ones_like(x), x], axis=1)
    hat = design @ np.linalg.inv(design.T @ design) @ design.T
    y = 1 + x + rng.normal(0, 0.1, len(x))
    fitted = hat @ y
    again = resampled(fitted, y - fitted, np.diag(hat), list(range(len(x))), 4000)
    slopes = again @ design @ np.linalg.inv(design.T @ design)
    textbook = 0.1 * np.linalg.inv(design.T @ design)[1, 1] ** 0.5
    assert slopes[:, 1].std() == pytest.approx(textbook, rel=0.15)
    assert slopes[:, 1].mean() == pytest.approx((np.linalg.inv(design.T @ design) @ design.T @ y)[1], abs=0.002)


def test_percentiles_leave_failed_fits_out_and_need_twenty():
    draws = np.concatenate([np.arange(101.0), [np.nan, np.inf]])
    assert percentiles(draws) == [2.5, 97.5]
    assert percentiles(np.arange(19.0)) is None
