"""The runs of an isoFLOP study: on planted losses, what is chosen; on real ones, that it goes through."""

from math import exp, log

import pytest

from sparsemix.config import ConfigError
from sparsemix.model import ModelConfig
from sparsemix.report.records import read_runs
from sparsemix.run import Run
from sparsemix.sweep.arms import Arm, rate_by_rule
from sparsemix.sweep.compare import CompareConfig
from sparsemix.sweep.grid import Ladders, folded
from sparsemix.sweep.isoflop import Grid, measured_ratio, planned_cells, run_grid, run_seeds
from sparsemix.sweep.ladder import TOKENS_PER_MAC, predicted, ratio_of
from sparsemix.sweep.study import Study
from tiny import T, unchecked_shapes, write_corpus

ARMS = (Arm("dense"), Arm("half", "mod", ("model.blocks.wrap.capacity=0.5",)))
SMALL = ["model.d_model=16", "model.blocks.count=2", "model.blocks.each.ffn.d_ff=40", "model.seq_len=16"]
SMALL += ["model.vocab_size=300", "data.vocab_size=300", f"train.batch_tokens={2 * T}", "train.evals=1"]
SMALL += ["train.eval_tokens=100", "train.test_tokens=150", "train.threads=1"]
BUDGETS = (1e12, 4e12)


class Planted:
    """A launcher whose runs end at once with the loss `of` (forward FLOPs per token, seed, rate over the rule's); an
    exception is a failure. It stops after `most` runs."""

    def __init__(self, of, most=10**9):
        self.of, self.most, self.trained = of, most, []

    def map(self, work, jobs, watch):
        for i, (job,) in enumerate(jobs):
            if len(self.trained) == self.most:
                raise KeyboardInterrupt
            self.trained.append(job.folder.name)
            config, run = job.config, Run(job.folder, job.config)
            cost = config.costs()
            loss = self.of(cost["flops_per_token"], config.seed, config.train.lr / rate_by_rule(config.model.d_model))
            if isinstance(loss, Exception):
                yield i, loss
                continue
            flops, tokens = config.steps * config.step_flops, config.steps * config.batch_size * T
            result = {"flops": flops, "tokens": tokens, "seed": config.seed, "lr": config.train.lr, "cost": cost}
            # The test loss is lowest where the validation loss is highest: nothing may be chosen by it.
            result |= {"validation_bpb": loss, "bpb": 9 - loss, "perplexity": exp(9 - loss), "lookahead_bpb": None}
            run.log(step=1, loss=loss, validation_bpb=loss, flops=flops, tokens=tokens, wall_s=1.0, tokens_per_s=1.0)
            run.finish(result | {"wall_s": 1.0, "tokens_per_s": 1.0, "peak_memory_bytes": 1})
            yield i, result


def valley(at, rate=1.0):
    """Losses with their minimum at a size, and at a multiple of the rule's learning rate."""
    return lambda flops, seed, times: 2 + 0.05 * log(flops / at) ** 2 + 0.1 * log(times / rate) ** 2 + 1e-4 * seed


@pytest.fixture
def opened(tmp_path):
    """Opens the study, as the same command does again and again."""

    def study(said=None):
        made = Study(tmp_path / "study", CompareConfig(), (said if said is not None else []).append)
        made.prepare(write_corpus(tmp_path))
        return made

    return study


def grid_of(**settings):
    return Grid("tiny", tuple(SMALL), **{"budgets": BUDGETS, "seeds": 3} | settings)


def sizes(records, role, arm="dense", budget=BUDGETS[0]):
    """(width, seed) of the runs, in their order."""
    chosen = [r for r in records if (r.arm, r.role, r.budget) == (arm, role, budget)]
    return [(r.settings["model"]["d_model"], r.seed) for r in chosen]


def nearest_width(study, flops, arm=ARMS[0]):
    rungs = Ladders([arm], grid_of(), study.data).rungs[arm.name]
    return min(rungs, key=lambda r: abs(log(r.forward_flops / flops))).size


def test_a_good_prediction_trains_five_sizes_and_the_other_seeds_at_the_optimum_by_validation(opened):
    study, launcher = opened(), Planted(valley(predicted(BUDGETS[0])))
    records = run_grid(study, ARMS, grid_of(budgets=BUDGETS[:1]), launcher)
    for arm in ARMS:
        tried = sizes(records, "grid", arm.name)
        assert len(tried) == 5 and {seed for _, seed in tried} == {0}
        best = nearest_width(study, predicted(BUDGETS[0]), arm)
        assert best in [width for width, _ in tried[1:-1]]
        assert sizes(records, "seed", arm.name) == [(best, 1), (best, 2)]
    assert [(r.arm, r.role, r.folder) for r in read_runs([study.out])] == [(r.arm, r.role, r.folder) for r in records]
    assert len(launcher.trained) == len(set(launcher.trained)) == len(records) == 14


def test_sizes_with_several_seeds_are_bracketed_by_their_mean(opened):
    study, at = opened(), predicted(BUDGETS[0])

    def of(flops, seed, rate):
        # Each seed alone has its optimum elsewhere.
        return valley(at)(flops, 0, rate) + (0.4 if seed else -0.4) * log(flops / at)

    grid = grid_of(budgets=BUDGETS[:1], size_seeds=2)
    records = run_grid(study, ARMS[:1], grid, Planted(of))
    best = nearest_width(study, at)
    every = sizes(records, "grid")
    assert len(every) == 5 and sizes(records, "seed") == [(width, 1) for width, _ in every] + [(best, 2)]
    assert measured_ratio(records[:10], "dense", BUDGETS[1]) == pytest.approx(ratio_of(BUDGETS[0], at), rel=1e-3)
    assert sorted(study.folder(cell) for cell in planned_cells(ARMS[:1], grid, study.data)) == sorted(
        r.folder for r in records
    )


@pytest.mark.parametrize("times", [0.3, 8.0])
def test_a_poor_prediction_is_extended_to_the_optimum_and_mended_for_the_next_budget(opened, times):
    study, said = opened(said := []), said
    at = times * predicted(BUDGETS[0])

    records = run_grid(study, ARMS[:1], grid_of(budgets=BUDGETS[:1]), Planted(valley(at)))
    tried = [width for width, _ in sizes(records, "grid")]
    best = nearest_width(study, at)
    assert len(tried) > 5 and min(tried) < best < max(tried)
    assert sizes(records, "seed") == [(best, 1), (best, 2)]
    assert measured_ratio(records, "dense", BUDGETS[1]) == pytest.approx(ratio_of(BUDGETS[0], at), rel=1e-3)
    assert measured_ratio(records, "dense", BUDGETS[0]) == TOKENS_PER_MAC
    assert measured_ratio(records, "half", BUDGETS[1]) == TOKENS_PER_MAC
    ladders = Ladders(ARMS[:1], grid_of(), study.data)
    next_sizes = [r.size for r in ladders.first(ARMS[0], BUDGETS[1], ratio_of(BUDGETS[0], at))]
    assert nearest_width(study, 2 * at) in next_sizes
    both = run_grid(opened(), ARMS[:1], grid_of(), Planted(valley(at)))
    assert [width for width, _ in sizes(both, "grid", budget=BUDGETS[1])][:5] == next_sizes


def test_a_named_list_is_extended_only_if_that_is_asked_for(opened):
    study, said = opened(said := []), said
    grid = grid_of(budgets=BUDGETS[:1], sizes=(16, 20, 24), extend=False)
    records = run_grid(study, ARMS[:1], grid, Planted(valley(1.0)))
    assert [w for w, _ in sizes(records, "grid")] == [16, 20, 24]
    assert sizes(records, "seed") == [(16, 1), (16, 2)]
    assert any("not bracketed: no smaller size" in line for line in said)
    more = run_grid(study, ARMS[:1], grid._replace(extend=True), Planted(valley(1.0)))
    assert [w for w, _ in sizes(more, "grid")] == [16, 20, 24, 12, 8]


@pytest.mark.parametrize("most", [3, 12])
def test_a_stopped_study_goes_on_and_trains_nothing_twice(opened, most):
    """After 3 runs it stands among the sizes, after 12 among the seeds."""
    grid, of = grid_of(budgets=BUDGETS[:1]), valley(predicted(BUDGETS[0]))
    with pytest.raises(KeyboardInterrupt):
        run_grid(opened(), ARMS, grid, Planted(of, most))
    rest = Planted(of)
    records = run_grid(opened(), ARMS, grid, rest)
    assert len(records) == 14 and len(rest.trained) == 14 - most
    again = run_grid(opened(), ARMS, grid, nothing := Planted(of))
    assert not nothing.trained and [r.folder for r in again] == [r.folder for r in records]


def test_a_failed_size_is_said_and_left_out_and_an_arm_without_a_run_has_no_optimum(opened):
    study, said = opened(said := []), said
    at = predicted(BUDGETS[0])
    best = nearest_width(study, at)
    broken = Ladders(ARMS, grid_of(), study.data).first(ARMS[0], BUDGETS[0])[1]

    def of(flops, seed, rate):
        return RuntimeError("burnt") if flops == broken.forward_flops else valley(at)(flops, seed, rate)

    records = run_grid(study, ARMS[:1], grid_of(budgets=BUDGETS[:1], retries=0), Planted(of))
    assert broken.size not in [w for w, _ in sizes(records, "grid")] and len(sizes(records, "grid")) >= 4
    assert sizes(records, "seed") == [(best, 1), (best, 2)]
    assert any("burnt" in line for line in said)
    grid = grid_of(budgets=BUDGETS[:1], retries=0)
    assert not run_grid(study, ARMS[1:], grid, Planted(lambda *_: RuntimeError("burnt")))
    assert "no run ended, so there is no optimum" in said[-1]


def test_a_swept_rate_is_interior_and_serves_every_size_and_budget(opened):
    study, said = opened(said := []), said
    records = run_grid(study, ARMS, grid_of(rates="sweep", seeds=2), Planted(valley(predicted(BUDGETS[0]), rate=4.0)))
    swept = [r for r in records if r.role == "rate" and r.arm == "half"]
    assert {r.budget for r in swept} == {BUDGETS[0]} and len({r.forward_flops for r in swept}) == 1
    assert [round(r.lr / swept[1].lr, 6) for r in swept] == [0.5, 1, 2, 4, 8]
    for r in records:
        if r.role != "rate":
            assert r.lr == pytest.approx(4 * rate_by_rule(r.settings["model"]["d_model"]))
    assert any("half: learning rate" in line for line in said)
    # The best trial is one of the sizes too, and is trained once for both.
    shared = [r for r in read_runs([study.out]) if r.folder == swept[3].folder]
    assert [r.role for r in shared] == ["rate", "grid"]


def test_planned_cells_are_the_runs_that_are_made_where_predictions_hold(opened):
    study, grid = opened(), grid_of(budgets=BUDGETS[:1])
    planned = planned_cells(ARMS, grid, study.data)
    records = run_grid(study, ARMS, grid, Planted(valley(predicted(BUDGETS[0]))))
    assert {study.folder(cell) for cell in planned} == {r.folder for r in records} and len(planned) == len(records)
    assert {(cell.arm, cell.role) for cell in planned} == {(r.arm, r.role) for r in records}


def test_seeds_of_one_size_at_the_swept_rate(opened):
    records = run_seeds(opened(), ARMS, grid_of(budgets=BUDGETS[:1], rates="sweep"), Planted(valley(1e5, rate=2.0)))
    made = [(r.arm, r.role, r.seed) for r in records if r.role != "rate"]
    assert made == [(arm.name, role, i) for i, role in enumerate(("grid", "seed", "seed")) for arm in ARMS]
    assert {r.lr for r in records if r.role != "rate"} == {2 * rate_by_rule(16)}
    assert {r.settings["model"]["d_model"] for r in records} == {16}


def test_a_given_rate_is_every_run_s(opened):
    records = run_grid(opened(), ARMS[:1], grid_of(rates="0.003", budgets=BUDGETS[:1], seeds=1), Planted(valley(1e5)))
    assert {r.lr for r in records} == {0.003}


def test_the_plan_builds_no_model_and_says_whose_parameters_fold(monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr(ModelConfig, "build", refuse)
    arms = [Arm(kind, kind) for kind in ("dense", "moe", "peer", "mod")]
    data = write_corpus(tmp_path).replace(vocab_size=1024)
    ladders = Ladders(arms, Grid("tiny", budgets=(1e12, 3e12)), data)
    for arm in arms:
        assert all(len(ladders.first(arm, budget)) == 5 for budget in (1e12, 3e12))
        assert ladders.middle(arm, 1e12) in ladders.first(arm, 1e12)[1:-1]
    assert folded(ladders) == []
    ladders.rungs["peer"] = [rung._replace(params=rung.params // rung.size**2) for rung in ladders.rungs["peer"]]
    assert [line.split()[0] for line in folded(ladders)] == ["peer"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sizes": (8, 13)}, "sizes=13"),
        ({"sizes": ("huge",)}, "recipe=tiny:huge"),
        ({"budgets": (1e6,)}, "budgets=1e.06 must pay for 50 steps at 5 sizes, as .* does"),
        ({"sizes": (8, 64, 80), "budgets": (1e9,)}, "budgets=1e.09 must pay for 50 steps at 3 sizes, as .* does"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_one_line(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says) as error:
        Ladders(ARMS[:1], grid_of(**settings), write_corpus(tmp_path))
    assert "\n" not in str(error.value)


def test_a_named_size_with_too_few_steps_is_left_out_with_a_line(tmp_path):
    ladders = Ladders(ARMS[:1], grid_of(sizes=(8, 12, 16, 64), budgets=(1e9,)), write_corpus(tmp_path))
    assert [r.size for r in ladders.first(ARMS[0], 1e9)] == [8, 12, 16]
    assert any("has no size 64: too few steps" in line for line in ladders.skipped)


class Here:
    """A launcher that does the work in this process."""

    def map(self, work, jobs, watch):
        for i, job in enumerate(jobs):
            yield i, work(*job)


def test_a_whole_study_trains_what_was_planned(opened, monkeypatch):
    monkeypatch.setattr("sparsemix.sweep.ladder.MIN_STEPS", 4)
    grid, budget = grid_of(budgets=(1.5e7,), sizes=(8, 12, 16), seeds=2, extend=False), 1.5e7
    with unchecked_shapes():
        records = run_grid(study := opened(), ARMS, grid, Here())
    assert [(r.arm, r.role) for r in records] == [
        *[("dense", "grid")] * 3,
        *[("half", "grid")] * 3,
        ("dense", "seed"),
        ("half", "seed"),
    ]
    planned = {r.forward_flops: r for r in Ladders(ARMS, grid, study.data).rungs["half"]}
    for r in records[3:6]:
        plan = planned[r.forward_flops]
        assert (plan.params, plan.tokens(budget)) == (r.params, r.tokens)
        assert plan.steps(budget) * plan.step_flops == pytest.approx(r.flops)
