"""The predictor of Mixture-of-Depths: its price, its accuracy, and that it changes nothing, from made and real runs."""

import json

import pytest
from made_mod_runs import made_seeds
from test_reproduce_mod import TINY

from sparsemix import train
from sparsemix.report.records import read_run
from sparsemix.reproduce import mod_pictures, mod_sampling, mod_speed
from sparsemix.reproduce.base import Lab
from sparsemix.reproduce.mod_arms import MOD, planned, router_bce
from sparsemix.reproduce.mod_identity import compare_bits, identity
from sparsemix.reproduce.mod_progress import by_then, over_steps
from sparsemix.reproduce.mod_speed import Speed
from tiny import prepared, run_config, unchecked_shapes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Real runs: with a predictor, without one, and with one of another seed; and the folder of their data."""
    out = tmp_path_factory.mktemp("study")
    with unchecked_shapes():
        data, shards = prepared(out)
        for name, blocks, seed in (("mod", "mod", 0), ("threshold", "threshold", 0), ("other", "mod", 1)):
            train.train(run_config(data, blocks, steps=6, seed=seed, dtype="float32"), out / "runs" / name, shards)
    runs = {name: read_run(out / "runs" / name, name) for name in ("mod", "threshold", "other")}
    return out, runs, data


def sampling_lab(out, monkeypatch, ratio=1.02, cost=(1.0025, 1.0025)):
    """A lab of made runs; ratio: step time with the predictor over that without; cost: the two cross-entropies'
    objective over the predictor's."""
    monkeypatch.setattr(
        mod_sampling,
        "step_times",
        lambda *_: Speed({"predictor": [ratio + 0.001 * i for i in range(20)], "none": [1.0] * 20}, "a machine"),
    )
    losses = [3.0, 3.0, *(3.0 * factor for factor in cost)]
    arms = mod_sampling.design(TINY).arms
    runs = {
        arm.name: made_seeds(out, arm, lambda arm: planned(TINY, arm), nats + 0.01, ahead=nats)
        for arm, nats in zip(arms, losses, strict=True)
    }
    return Lab(TINY, out, runs, lambda _: None)


def test_sampling_is_reproduced_where_the_runs_are_as_the_paper_says(tmp_path, monkeypatch):
    outcome = mod_sampling.outcome(sampling_lab(tmp_path, monkeypatch))
    said = {trend.claim: trend.outcome for trend in outcome.trends}
    assert set(said.values()) == {"reproduced"} and len(said) == 7
    assert {len(row) - len(table.columns) for table in outcome.tables for row in table.rows} == {0}
    assert [figure.id for figure in outcome.figures] == ["predictor-over-steps"]


def test_a_dear_cross_entropy_and_a_slow_predictor_are_not(tmp_path, monkeypatch):
    outcome = mod_sampling.outcome(sampling_lab(tmp_path, monkeypatch, ratio=1.3, cost=(1.02, 0.99)))
    said = [trend.outcome for trend in outcome.trends]
    assert said.count("not reproduced") == 3


def test_training_with_a_predictor_is_training_without_one_bit_by_bit(trained):
    _, runs, _ = trained
    pair = compare_bits(runs["mod"], runs["threshold"])
    assert pair.identical and pair.alike and pair.steps == 6 and pair.tensors > 10
    assert identity("same", [pair]).outcome == "reproduced"


def test_another_seed_is_seen_from_its_first_step(trained):
    _, runs, _ = trained
    pair = compare_bits(runs["mod"], runs["other"])
    assert not pair.identical and pair.first_unlike == 1 and "embed.weight" in pair.unlike
    assert identity("same", [pair]).outcome == "not reproduced"
    assert identity("same", [pair._replace(alike=False)]).outcome == "not resolved at this scale"


def test_the_agreement_over_steps_is_what_the_steps_logged(trained):
    _, runs, _ = trained
    curves = over_steps(runs["mod"])
    lines = [
        json.loads(line) for line in (runs["mod"].folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert curves["accuracy"] == [(line["step"], line["blocks.1.accuracy"]) for line in lines]
    assert by_then(curves["recall"], 0.5) == lines[2]["blocks.1.recall"]
    assert over_steps(runs["threshold"]) == {}


def test_steps_are_timed_by_turns_once(trained, monkeypatch):
    out, _, data = trained
    (out / "data").symlink_to(out / "shards")
    monkeypatch.setattr(mod_speed, "ROUNDS", 3)
    lab = Lab(TINY, out, {}, lambda _: None)
    configs = {"mod": run_config(data, "mod"), "dense": run_config(data, "dense")}
    speed = mod_speed.step_times(lab, configs)
    assert {len(seconds) for seconds in speed.seconds.values()} == {3} and min(speed.seconds["mod"]) > 0
    monkeypatch.setattr(mod_speed, "_measured", lambda *_: pytest.fail("measured again"))
    assert mod_speed.step_times(lab, configs) == speed


def test_the_ratio_of_step_times_is_taken_round_by_round():
    drift = [1.0 + i for i in range(30)]
    speed = Speed({"a": [1.2 * t for t in drift], "b": drift}, "")
    ratio, (low, high) = speed.ratio("a", "b")
    assert ratio == pytest.approx(1.2) == low == high


def test_the_routing_of_a_trained_model_is_looked_at_once(trained, monkeypatch):
    out, runs, _ = trained
    lab = Lab(TINY, out, {}, lambda _: None)
    monkeypatch.setattr(mod_pictures, "TOKENS", 200)
    (out / "data").exists() or (out / "data").symlink_to(out / "shards")
    seen = mod_pictures.observed(lab, runs["mod"])
    first, second = seen["map"]["blocks"]
    assert set(first) == {1} and set(second) <= {0, 1} and len(second) == 128
    assert sum(seen["weights"]) == sum(seen["passes"]) and list(seen["routed"]) == ["blocks.1"]
    monkeypatch.setattr(mod_pictures, "_observe", lambda *_: pytest.fail("looked again"))
    assert mod_pictures.observed(lab, runs["mod"]) == seen


@pytest.mark.parametrize(
    ("above", "together", "said"),
    [(0.125, [700, 100, 200], "reproduced"), (0.5, [300, 600, 100], "not reproduced")],
    ids=["planted", "reversed"],
)
def test_claims_about_routing_follow_what_was_seen(tmp_path, monkeypatch, above, together, said):
    seen = {
        "weights": [10] * 20, "above_half": above, "routed": {"blocks.1": 0.4, "blocks.3": 0.4}, "passes": together,
        "entropy": 0.2 if said == "reproduced" else -0.2, "map": {"blocks": [[1] * 16, [0, 1] * 8], "texts": []},
    }  # fmt: skip
    monkeypatch.setattr(
        mod_pictures,
        "observed",
        lambda _, run: seen | {"above_half": above + 1e-3 * run.seed, "entropy": seen["entropy"] + 1e-3 * run.seed},
    )
    arms = (MOD, router_bce(0.1))
    lab = Lab(TINY, tmp_path, {a.name: made_seeds(tmp_path, a, lambda a: planned(TINY, a), 3.0) for a in arms}, print)
    outcome = mod_pictures.outcome(lab)
    assert {trend.outcome for trend in outcome.trends} == {said}
    alone = {"routed": {"blocks.1": 0.4}, "passes": [600, 400]}
    monkeypatch.setattr(mod_pictures, "observed", lambda *_: seen | alone)
    told = {trend.claim: trend for trend in mod_pictures.outcome(lab).trends}
    for words in ("pass all routed blocks", "pass none of them"):
        (trend,) = [trend for claim, trend in told.items() if words in claim]
        assert trend.outcome == "not resolved at this scale" and trend.evidence == "these models have one routed block"
    assert [figure.id for figure in outcome.figures] == [
        "taken-predictor",
        "weights-predictor",
        "taken-bce",
        "weights-bce",
    ]
