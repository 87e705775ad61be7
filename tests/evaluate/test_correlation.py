import numpy as np
import pytest
from scipy import stats

from sparsemix.evaluate.correlation import correlations


def sample(num_docs=40, per_doc=30, slope=0.5, seed=0):
    rng = np.random.default_rng(seed)
    docs = np.repeat(np.arange(num_docs) * 7, per_doc)
    x = rng.normal(size=len(docs)).round(1)
    return x, slope * x + rng.normal(size=len(docs)) + rng.normal(size=num_docs)[docs // 7], docs


def test_both_coefficients_are_those_of_scipy():
    x, y, docs = sample()
    found = correlations(x, np.exp(y), docs)
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, np.exp(y)).statistic, rel=1e-10)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, np.exp(y)).statistic, rel=1e-10)
    assert found["tokens"] == len(x) and found["documents"] == 40


def test_a_monotone_relation_is_one_for_spearman_alone():
    x = np.arange(50.0)
    found = correlations(x, np.exp(x / 3), np.arange(50))
    assert found["spearman"] == pytest.approx(1.0) and found["pearson"] < 0.8


def test_the_interval_widens_when_the_tokens_of_a_document_go_together():
    rng = np.random.default_rng(0)
    docs = np.repeat(np.arange(30), 50)
    x, y = rng.normal(size=30)[docs], rng.normal(size=30)[docs]
    noise = rng.normal(size=(2, len(docs)))
    low, high = correlations(x + 0.1 * noise[0], y + 0.1 * noise[1], docs)["pearson_ci"]
    apart_low, apart_high = correlations(x + 0.1 * noise[0], y + 0.1 * noise[1], np.arange(len(docs)))["pearson_ci"]
    assert high - low > 3 * (apart_high - apart_low)


def test_the_interval_holds_the_true_value_most_of_the_time():
    truth = 0.5 / np.sqrt(0.25 + 1 + 1)
    held = 0
    for seed in range(40):
        low, high = correlations(*sample(slope=0.5, seed=seed))["pearson_ci"]
        held += low <= truth <= high
    assert held >= 33


def test_tokens_that_a_layer_did_not_see_are_left_out():
    x, y, docs = sample()
    seen = np.arange(len(x)) % 3 > 0
    found = correlations(np.where(seen, x, np.nan), y, docs)
    assert found == correlations(x[seen], y[seen], docs[seen]) and found["tokens"] == seen.sum()


def test_a_constant_has_no_correlation_and_few_documents_no_interval():
    x, y, docs = sample(num_docs=9)
    few = correlations(x, y, docs)
    assert few["pearson"] is not None and few["pearson_ci"] is None
    flat = correlations(np.full_like(x, 0.1), y, docs)
    assert flat["pearson"] is flat["spearman"] is flat["pearson_ci"] is None
    empty = correlations(np.full_like(x, np.nan), y, docs)
    assert empty["tokens"] == empty["documents"] == 0 and empty["pearson"] is None
