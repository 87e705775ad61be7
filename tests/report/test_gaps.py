"""Verdicts against the baseline: how often they err, what they find, what they rest on."""

from dataclasses import replace

import numpy as np
import pytest
from made_records import ARMS, DENSE, document_bytes, made_record, made_study

from sparsemix.config import ConfigError
from sparsemix.report.fits.curves import Curve, curves_of
from sparsemix.report.fits.gaps import BOTH, SEEDS, WELCH, gap_between
from sparsemix.report.fits.quantities import Terms, quantities_of
from sparsemix.report.stats import Interval, holm, smallest_visible

BUDGETS, RIVALS, SD, SHARED = (1e13, 3e13), ("moe", "peer", "mod"), 0.01, 0.3
COMPARISONS = len(BUDGETS) * len(RIVALS)
TERMS = Terms("dense", frozenset(ARMS), repeated=frozenset(), resamples=100)
MADE = {
    (arm, budget, seed): made_record(arm, budget, 3e5, seed, 3.0, DENSE)
    for arm in ("dense", *RIVALS)
    for budget in BUDGETS
    for seed in range(5)
}


def seeds_of_everybody(rng, shifts):
    """Curves of one size and five seeds an arm and budget, each arm shifted by so many nats from 3."""
    curves = []
    for budget in BUDGETS:
        common = rng.normal(0, SD * SHARED**0.5, 5)
        for arm in ("dense", *RIVALS):
            nats = 3 + shifts.get((arm, budget), 0.0) + common + rng.normal(0, SD * (1 - SHARED) ** 0.5, 5)
            point = tuple(replace(MADE[arm, budget, s], nats=float(n), bpb=float(0.4 * n)) for s, n in enumerate(nats))
            curves.append(Curve(arm, budget, (point,), 0.4))
    return curves


def p_values(rng, shifts=None):
    """Holm's p-value of every arm and budget."""
    curves = {(c.arm, c.budget): c for c in seeds_of_everybody(rng, shifts or {})}
    gaps = {key: gap_between(c, curves["dense", c.budget], 100) for key, c in curves.items() if key[0] != "dense"}
    return dict(zip(gaps, holm([gap.difference.p_value for gap in gaps.values()]), strict=True))


def test_quantities_have_holms_p_values_over_arms_and_budgets():
    curves = seeds_of_everybody(np.random.default_rng(5), {("moe", 1e13): -0.02})
    entries, _ = quantities_of(curves, dict.fromkeys((c.arm, c.budget) for c in curves), None, TERMS)
    found = {(e["arm"], e["budget"]): e["p_value"] for e in entries if e["arm"] != "dense"}
    assert found == p_values(np.random.default_rng(5), {("moe", 1e13): -0.02}) and len(found) == COMPARISONS
    assert [e["verdict"] for e in entries if e["arm"] == "dense"] == ["baseline"] * 2


def test_any_false_verdict_comes_in_five_per_cent_of_studies():
    rng = np.random.default_rng(0)
    false = [min(p_values(rng).values()) <= 0.05 for _ in range(1200)]
    # The six tests share the baseline's seeds, so that Holm is a little careful.
    assert 0.03 < np.mean(false) < 0.065


def test_twice_the_visible_effect_is_found():
    se = SD * (2 * (1 - SHARED) / 5) ** 0.5
    visible = smallest_visible(Interval(0, 0, 0, se, se, 0.0, 4, 1.0), COMPARISONS)
    rng = np.random.default_rng(1)
    twice = [p_values(rng, {("moe", 1e13): -2 * visible})["moe", 1e13] <= 0.05 for _ in range(150)]
    once = [p_values(rng, {("moe", 1e13): -visible})["moe", 1e13] <= 0.05 for _ in range(150)]
    half = [p_values(rng, {("moe", 1e13): -visible / 3})["moe", 1e13] <= 0.05 for _ in range(150)]
    assert np.mean(twice) > 0.97 and 0.7 < np.mean(once) < 0.95 and np.mean(half) < 0.4


def pair(records, arm="moe"):
    curves = curves_of([r for r in records if r.role != "rate"], ["dense", "moe", "peer", "mod"], 0.4)
    return next(c for c in curves if c.arm == arm), next(c for c in curves if c.arm == "dense")


def test_what_seeds_share_cancels():
    apart = gap_between(*pair(made_study(budgets=(1e13,), sd=0.02, shared=0.0)), 100)
    together = gap_between(*pair(made_study(budgets=(1e13,), sd=0.02, shared=1.0)), 100)
    assert together.difference.interval.se < apart.difference.interval.se / 100
    assert together.seeds == 5


def test_documents_widen_the_interval_and_are_named(tmp_path):
    with_documents = gap_between(*pair(made_study(budgets=(1e13,), folder=tmp_path)), 300)
    without = gap_between(*pair(made_study(budgets=(1e13,), folder=None)), 300)
    assert (with_documents.test, without.test) == (BOTH, SEEDS)
    assert with_documents.difference.interval.se_docs > 0 == without.difference.interval.se_docs


def test_the_gap_in_nats_is_that_of_the_records(tmp_path):
    arm, base = pair(made_study(budgets=(1e13,), folder=tmp_path))
    gap = np.mean([r.nats for r in arm.seeded]) - np.mean([r.nats for r in base.seeded])
    per_nat = base.seeded[0].bpb / base.seeded[0].nats
    assert gap_between(arm, base, 100).difference.interval.estimate == pytest.approx(gap * per_nat, rel=1e-6)


def test_other_test_documents_are_refused(tmp_path):
    arm, base = pair(made_study(budgets=(1e13,), folder=tmp_path))
    path = arm.seeded[0].folder / "documents.npz"
    np.savez(path, nats=np.ones(len(document_bytes())), bytes=document_bytes() + 1)
    with pytest.raises(ConfigError, match=r"test documents of .* differ"):
        gap_between(arm, base, 100)


def test_one_seed_gives_the_fitted_gap_and_no_p_value():
    arm, base = pair(made_study(budgets=(1e13,), num_seeds=1))
    gap = gap_between(arm, base, 100)
    assert gap.test == WELCH and not gap.difference.interval.seeds_seen
    low, high = gap.difference.interval.low / 0.4, gap.difference.interval.high / 0.4
    assert low < ARMS["moe"].best(1e13)[1] - DENSE.best(1e13)[1] < high


def test_equal_losses_of_all_seeds_are_no_gap_and_equal_gaps_are_certain():
    arm, base = pair(made_study(budgets=(1e13,), sd=0.0))
    assert gap_between(base, base, 100).difference.p_value == 1
    assert gap_between(arm, base, 100).difference.p_value == pytest.approx(1e-12)
