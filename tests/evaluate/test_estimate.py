"""Standard errors of ratios over documents: their coverage, and where there are none."""

import numpy as np
import pytest

from sparsemix.evaluate.estimate import exponential, ratio, share


def corpus(rng, n):
    """Nats and bytes of documents of very different lengths, the short ones harder."""
    x = np.ceil(rng.lognormal(5, 1, n))
    return x * (1 + 2 / np.sqrt(x) + 0.3 * rng.standard_normal(n)), x


def test_the_interval_covers_the_truth_as_often_as_it_says_and_a_mean_of_quotients_does_not():
    rng = np.random.default_rng(0)
    y, x = corpus(rng, 2_000_000)
    truth, inside, naive = y.sum() / x.sum(), 0, 0
    for _ in range(2000):
        pick = rng.integers(0, len(y), 100)
        found = ratio(y[pick], x[pick])
        inside += abs(found.value - truth) < 1.96 * found.error
        quotients = y[pick] / x[pick]
        naive += abs(quotients.mean() - truth) < 1.96 * quotients.std(ddof=1) / 10
    assert 0.91 < inside / 2000 < 0.96
    assert naive / 2000 < 0.7


def test_the_error_is_that_of_a_bootstrap_over_documents():
    rng = np.random.default_rng(1)
    y, x = corpus(rng, 400)
    picks = rng.integers(0, 400, (4000, 400))
    assert ratio(y, x).error == pytest.approx((y[picks].sum(1) / x[picks].sum(1)).std(), rel=0.05)
    bits = np.exp(y[picks].sum(1) / x[picks].sum(1)).std()
    assert exponential(ratio(y, x)).error == pytest.approx(bits, rel=0.05)


def test_a_total_over_sources_has_the_error_of_a_bootstrap_within_each():
    rng = np.random.default_rng(2)
    parts = [corpus(rng, n) for n in (150, 300)]
    y, x = np.concatenate([parts[0][0] * 3, parts[1][0]]), np.concatenate([parts[0][1], parts[1][1]])
    picks = np.concatenate([rng.integers(0, 150, (4000, 150)), rng.integers(150, 450, (4000, 300))], axis=1)
    strata = ["a"] * 150 + ["b"] * 300
    error = ratio(y, x, strata).error
    assert error == pytest.approx((y[picks].sum(1) / x[picks].sum(1)).std(), rel=0.06)
    assert error < 0.9 * ratio(y, x).error


def test_equal_lengths_give_the_standard_error_of_a_mean():
    y = np.random.default_rng(3).standard_normal(57)
    found = ratio(y, np.full(57, 4.0))
    assert found.value == pytest.approx(y.mean() / 4, rel=1e-12)
    assert found.error == pytest.approx(y.std(ddof=1) / np.sqrt(57) / 4, rel=1e-12)


def test_a_constant_rate_has_no_error_whatever_the_lengths():
    x = np.array([1.0, 7, 300, 12])
    assert ratio(2.5 * x, x) == pytest.approx((2.5, 0.0), abs=1e-12)


def test_one_document_says_nothing_of_the_error():
    one = np.ones(1)
    assert ratio(one, one).error is None
    assert exponential(ratio(one, one)).error is None
    assert share(np.array([True])).error is None
    # Lone documents of several sources share a stratum; one beside a larger source has none.
    three, x = np.array([1.0, 2.0, 4.0]), np.ones(3)
    assert ratio(three, x, ["a", "b", "c"]).error == pytest.approx(three.std(ddof=1) / np.sqrt(3))
    assert ratio(three, x, ["a", "a", "b"]).error is None


def test_accuracy_has_the_binomial_error():
    right = np.arange(80) < 20
    found = share(right)
    assert found.value == 0.25
    assert found.error == pytest.approx(right.std(ddof=1) / np.sqrt(80), rel=1e-12)


def test_a_diverged_model_has_an_infinite_perplexity():
    assert exponential(ratio(np.array([1e4, 2e4]), np.ones(2))).value == np.inf
    assert not np.isfinite(exponential(ratio(np.array([np.inf, 2.0, 3.0]), np.ones(3)))).any()
