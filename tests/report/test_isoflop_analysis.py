"""A study's dictionary: complete, JSON-able, and right about planted laws."""

import json
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from made_records import ARMS, DENSE, MOE, Law, made_record, made_study

from sparsemix.config import ConfigError
from sparsemix.report.fits.gaps import BOTH
from sparsemix.report.isoflop import analyse

QUANTITIES = {
    "arm", "budget", "optimal_params", "optimal_params_ci", "nats", "nats_ci", "bpb", "bpb_ci", "gap_nats",
    "gap_nats_ci", "gap_percent", "gap_percent_ci", "gap_bpb", "gap_bpb_ci", "p_value", "verdict", "test", "visible",
    "forward_ratio", "forward_ratio_ci", "flop_multiplier", "flop_multiplier_ci", "wall_multiplier",
    "wall_multiplier_ci", "steps_per_s_ratio", "steps_per_s_ratio_ci", "seeds", "effective_documents", "limit",
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
            assert entry["verdict"] == "better" and entry["gap_nats"] == pytest.approx(gap, abs=0.02)
            assert entry["gap_nats_ci"][0] < entry["gap_nats"] < entry["gap_nats_ci"][1] < 0
            assert 0 < entry["visible"] < 0.06 and entry["test"] == BOTH
        if entry["arm"] == "mod":
            assert entry["verdict"].startswith("not resolved")


def test_runs_on_other_texts_are_refused(study):
    other = made_study(seed=1)
    other[0].settings["data"]["fingerprint"] = "another"
    with pytest.raises(ConfigError, match="corpus is"):
        analyse([*study, *other])


PAIR = {"dense": DENSE, "moe": MOE}


def summary(records, **settings):
    """(verdicts of moe by budget, warnings, what is not shown), from a dictionary that is JSON without NaN."""
    analysis = json.loads(json.dumps(analyse(records, resamples=60, **settings), allow_nan=False))
    verdicts = {q["budget"]: q["verdict"] for q in analysis["quantities"] if q["arm"] == "moe"}
    return verdicts, "\n".join(analysis["warnings"]), "\n".join(analysis["does_not_show"])


def test_a_clean_study_has_no_warning_about_its_curves(tmp_path):
    verdicts, warnings, unshown = summary(made_study(PAIR, num_sizes=5, sd=0.002, folder=tmp_path))
    assert verdicts == {1e13: "better", 3e13: "better"} and not warnings
    assert "one seed" not in unshown and "documents" not in unshown and "none was searched" not in unshown


def test_sizes_on_one_side_give_no_verdict_where_it_could_mislead():
    off = [r for r in made_study(PAIR, shift=1.5, sd=0.003) if r.arm == "dense"]
    centred = [r for r in made_study(PAIR, sd=0.003) if r.arm == "moe"]
    verdicts, warnings, _ = summary(off + centred)
    assert set(verdicts.values()) == {"no verdict: the optimum of dense is not bracketed"}
    assert "dense at 1e+13 FLOPs: not bracketed, of " in warnings
    # An arm that wins although it is off its optimum wins.
    off = [r for r in made_study(PAIR, shift=1.5, sd=0.003) if r.arm == "moe"]
    centred = [r for r in made_study(PAIR, sd=0.003) if r.arm == "dense"]
    assert set(summary(off + centred)[0].values()) == {"better"}
    worse = {"dense": DENSE, "moe": Law(A=140.0)}
    off = [r for r in made_study(worse, shift=2.0, sd=0.003) if r.arm == "moe"]
    assert set(summary(off + centred)[0].values()) == {"no verdict: the optimum of moe is not bracketed"}


def test_repeated_text_warns_and_beyond_four_epochs_gives_no_verdict(tmp_path):
    study = made_study(PAIR, (1e13, 1e16), folder=tmp_path)
    verdicts, warnings, _ = summary(study)
    assert verdicts == {1e13: "better", 1e16: "no verdict: more than 4 epochs over the training text"}
    assert "epochs over the training text" in warnings and "beyond 4 epochs there is no verdict" in warnings
    verdicts, warnings, _ = summary(study, allow_repeats=True)
    assert verdicts[1e16] == "better" and "there is no verdict" not in warnings


def test_what_is_missing_is_said():
    one_seed = summary(made_study(PAIR, num_seeds=1))
    assert set(one_seed[0].values()) == {"not resolved: one seed cannot tell a kind from its luck"}
    assert "dense at 1e+13 FLOPs: one seed" in one_seed[1] and "fewer than three" in one_seed[2]
    alone = summary(made_study({"moe": MOE}))
    assert set(alone[0].values()) == {"no verdict: no baseline"} and "no run of the baseline dense" in alone[1]
    untuned = summary(made_study(PAIR, rates=False))
    assert (
        set(untuned[0].values()) == {"better, untuned"} and "dense, moe with a learning rate of its own" in untuned[2]
    )
    few = summary(made_study(PAIR, num_sizes=3))
    assert "no optimum, 3 sizes" in few[1]
    assert "data folder is missing" in few[1] and "losses by document are missing" in few[2]


def test_wide_grids_duplicates_and_rates_at_the_end_are_said():
    assert "sizes span 256 times" in summary(made_study(PAIR, step=4.0))[1]
    study = made_study(PAIR)
    again = replace(study[0], folder=Path("runs/again"), nats=9.0, bpb=study[0].bpb / study[0].nats * 9.0)
    verdicts, warnings, _ = summary([*study, again])
    assert "again have equal size" in warnings and verdicts == summary(study)[0]
    rates = [r for r in study if r.role == "rate" and r.arm == "dense"]
    lowest = replace(min(rates, key=lambda r: r.lr), validation_bpb=0.1)
    assert "dense at 1e+13 FLOPs: the best learning rate 0.0015 is at the end" in summary([*study, lowest])[1]


def test_sizes_alone_are_compared_as_such():
    runs = [
        made_record(arm, 1e13, 3e5, s, 3 - 0.1 * (arm == "moe") + 0.01 * s, DENSE) for arm in PAIR for s in range(3)
    ]
    verdicts, _, _ = summary(runs)
    assert verdicts[1e13] == "better, untuned, at one size"


def test_runs_that_cannot_be_fitted_are_refused():
    study = made_study(PAIR)
    with pytest.raises(ConfigError, match="no size of a grid"):
        analyse([r for r in study if r.role == "rate"])
    with pytest.raises(ConfigError, match="tested on different tokens"):
        analyse([replace(study[0], bpb=2 * study[0].bpb), *study[1:]])
    lost = [replace(r, nats=inf) for r in study if r.role != "rate"]
    with pytest.raises(ConfigError, match=f"no size of a grid .role grid or seed.; {len(lost)} diverged"):
        analyse(lost)


@pytest.mark.parametrize("arm", ["dense", "moe"])
def test_a_diverged_run_is_named_and_withholds_the_verdict_on_its_arm_at_its_budget(arm):
    study = made_study(PAIR, num_sizes=5, sd=0.002)
    before = {q["budget"]: q["verdict"] for q in analyse(study)["quantities"] if q["arm"] == "moe"}
    at = next(i for i, r in enumerate(study) if r.arm == arm and r.role == "seed" and r.budget == 1e13)
    analysis = analyse([*study[:at], replace(study[at], nats=inf, bpb=inf), *study[at + 1 :]])
    (lost,) = analysis["diverged"]
    assert (lost["arm"], lost["budget"], lost["seed"]) == (arm, 1e13, study[at].seed)
    assert lost["why"] == "its test loss is not finite"
    assert any(f"{arm} at 1e+13 FLOPs" in said and "diverged" in said for said in analysis["warnings"])
    after = {q["budget"]: q["verdict"] for q in analysis["quantities"] if q["arm"] == "moe"}
    assert after == before | {1e13: f"no verdict: runs of {arm} diverged, and losses are of those that did not"}
    assert len(analysis["runs"]) == len(study) - 1


def test_a_table_that_jumps_from_one_size_to_the_next_does_not_move_the_optimum():
    study = made_study({"dense": DENSE}, (1e13,), rates=False)
    first = min(r.params for r in study)
    jumped = [replace(r, params=r.params * (1 if r.params == first else 7)) for r in study]
    (quiet,), (found,) = (analyse(records)["curves"] for records in (study, jumped))
    assert found["bracketed"] and found["optimum"]["forward_flops"] == quiet["optimum"]["forward_flops"]
    assert found["optimum"]["params"] == pytest.approx(7 * quiet["optimum"]["params"], rel=1e-6)
    # Tables that shrink as models grow have no order of their own.
    shrunk = [replace(r, params=10**9 // r.params) for r in study]
    (folded,) = analyse(shrunk)["curves"]
    low, high = folded["optimum"]["params_ci"]
    assert low < folded["optimum"]["params"] < high
    assert [p["forward_flops"] for p in folded["points"]] == [p["forward_flops"] for p in quiet["points"]]
