"""A study's dictionary: complete, JSON-able, and right about planted laws."""

import json

import pytest
from made_records import ARMS, made_study

from sparsemix.config import ConfigError
from sparsemix.report.isoflop import analyse

QUANTITIES = {
    "arm", "budget", "optimal_params", "optimal_params_ci", "nats", "nats_ci", "bpb", "bpb_ci", "gap_nats",
    "gap_nats_ci", "gap_percent", "gap_percent_ci", "gap_bpb", "gap_bpb_ci", "p_value", "verdict", "test", "visible",
    "forward_ratio", "forward_ratio_ci", "flop_multiplier", "flop_multiplier_ci", "wall_multiplier",
    "wall_multiplier_ci", "steps_per_s_ratio",
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return made_study(folder=tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def analysis(study):
    return analyse(study, command="sparsemix isoflop", resamples=400)


def test_the_dictionary_is_complete_and_json(analysis):
    assert json.loads(json.dumps(analysis, allow_nan=False))["arms"] == list(ARMS)
    assert len(analysis["curves"]) == len(analysis["quantities"]) == 8
    assert all(set(entry) == QUANTITIES for entry in analysis["quantities"])
    assert analysis["seeds"] == {arm: {1e13: 5, 3e13: 5} for arm in ARMS}
    assert analysis["corpus"]["train_tokens"] == 60_000_000


def test_planted_optima_lie_in_their_intervals(analysis):
    for curve in analysis["curves"]:
        params, nats = ARMS[curve["arm"]].best(curve["budget"])
        assert curve["bracketed"]
        assert curve["optimum"]["params"] == pytest.approx(params, rel=0.1)
        assert curve["optimum"]["nats"] == pytest.approx(nats, abs=0.015)


def test_planted_gaps_are_found_and_no_gap_is_not(analysis):
    for entry in analysis["quantities"]:
        if entry["arm"] in ("moe", "peer"):
            gap = ARMS[entry["arm"]].best(entry["budget"])[1] - ARMS["dense"].best(entry["budget"])[1]
            assert entry["verdict"] == "better" and entry["gap_nats_ci"][0] < gap < entry["gap_nats_ci"][1]
        if entry["arm"] == "mod":
            assert entry["verdict"].startswith("not resolved")


def test_runs_on_other_texts_are_refused(study):
    other = made_study(seed=1)
    other[0].settings["data"]["fingerprint"] = "another"
    with pytest.raises(ConfigError, match="corpus is"):
        analyse([*study, *other])
