"""A folder of many runs: shared, resumed, refused where it is another's."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import yaml

from sparsemix.config import ConfigError, parse
from sparsemix.durable import SEAL
from sparsemix.report.records import arm_of, read_run, read_runs, same_terms
from sparsemix.run import Run
from sparsemix.settings import RunConfig
from sparsemix.sweep.compare import CompareConfig
from sparsemix.sweep.jobs import outcome, train_job
from sparsemix.sweep.launch import make_launcher
from sparsemix.sweep.study import Cell, Study
from sparsemix.trained import find_shards
from tiny import run_config, write_corpus


def one_worker():
    return make_launcher("local", Path("unused"), ["threads=1"], 1)


@pytest.fixture
def study(tmp_path):
    made = Study(tmp_path / "study", CompareConfig(), lambda _: None)
    made.prepare(write_corpus(tmp_path))
    return made


def cell(study, kind, **settings):
    return Cell(kind, run_config(study.data, kind, **settings))


def test_cells_of_equal_settings_share_a_run_and_a_second_call_trains_nothing(study):
    same = [cell(study, "dense"), Cell("baseline", cell(study, "dense").config, "seed")]
    with one_worker() as workers:
        first = study.train([*same, cell(study, "moe")], workers, "training")
        logged = {r.folder: (r.folder / "metrics.jsonl").stat().st_mtime_ns for r in first}
        again = study.train([*same, cell(study, "moe")], workers, "training")
    assert [r.arm for r in first] == ["dense", "baseline", "moe"] and len(logged) == 2
    assert {r.folder: (r.folder / "metrics.jsonl").stat().st_mtime_ns for r in again} == logged
    read = read_runs([study.out])
    assert [(r.arm, r.role) for r in read] == [("dense", "grid"), ("baseline", "seed"), ("moe", "grid")]
    assert read[2].params == cell(study, "moe").config.model.cost().params
    nats, num_bytes = read[0].documents()
    assert read[0].bpb == pytest.approx(nats.sum() / num_bytes.sum() / 0.6931471805599453)


def test_a_failed_run_is_said_and_stops_nobody(study):
    said = []
    study.say = said.append
    with one_worker() as workers:
        bad = cell(study, "dense", lr=1e30)
        records = study.train([bad, cell(study, "moe")], workers, "training")
    assert records[0] is None and records[1].arm == "moe"
    assert list(study.failed) == [bad.run] and "non-finite" in study.failed[bad.run]
    assert any(bad.run in line for line in said)


def test_other_settings_are_refused_and_name_what_differs(study):
    with one_worker() as workers:
        study.train([cell(study, "dense")], workers, "training")
    Study(study.out, CompareConfig(), print)
    with pytest.raises(ConfigError, match="seeds=3 there, 5 asked"):
        Study(study.out, CompareConfig(seeds=5), print)


def test_runs_are_named_by_what_they_are_and_old_ones_are_read(study):
    with one_worker() as workers:
        records = study.train([cell(study, kind) for kind in ("dense", "mh_moe", "nested")], workers, "training")
    assert [arm_of(r.settings) for r in records] == ["dense", "mh_moe", "mod+moe+peer+expert_choice"]
    old = records[0].folder
    result = json.loads((old / "result.json").read_text(encoding="utf-8"))
    del result["cost"], result["convention"]
    (old / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (old / SEAL).unlink()
    before = read_run(old)
    assert before.params == records[0].params
    assert before.forward_flops == pytest.approx(records[0].forward_flops)
    same_terms([before, records[1]])


def test_runs_on_other_texts_are_not_compared(study, tmp_path):
    with one_worker() as workers:
        records = study.train([cell(study, "dense"), cell(study, "moe")], workers, "training")
    records[1].settings["data"]["fingerprint"] = "other"
    with pytest.raises(ConfigError, match="corpus is"):
        same_terms(records)


class InProcess:
    """The launcher of a process that trains its runs itself."""

    workers = threads = 1

    def map(self, work, jobs, watch):
        for i, job in enumerate(jobs):
            yield i, outcome(work, job)
            watch()


def train_seeds(out, data, seeds, kinds):
    """In a process of its own: what a second command on the same folder does."""
    study = Study(out, CompareConfig(), lambda _: None)
    study.prepare(data)
    cells = [cell(study, kind, seed=seed, steps=12) for kind in kinds for seed in seeds]
    return [(record.arm, record.seed) for record in study.train(cells, InProcess(), "training") if record is not None]


def test_two_processes_on_one_folder_share_the_runs_and_their_plan(study):
    with one_worker(), multiprocessing.get_context("forkserver").Pool(2) as both:
        first = both.apply_async(train_seeds, (study.out, study.data, [0, 1, 2], ["dense"]))
        second = both.apply_async(train_seeds, (study.out, study.data, [2, 1, 0], ["dense", "moe"]))
        assert first.get() == [("dense", seed) for seed in (0, 1, 2)]
        assert second.get() == [(kind, seed) for kind in ("dense", "moe") for seed in (2, 1, 0)]
    plan = yaml.safe_load((study.out / "plan.yaml").read_text(encoding="utf-8"))
    assert len(plan["cells"]) == 6 and len({entry["run"] for entry in plan["cells"]}) == 6
    for run in (study.out / "runs").iterdir():
        # Whoever trained it, once: a second process would have logged steps again.
        assert [line["step"] for line in Run(run).metrics()] == list(range(1, 13))
        assert not Run(run).busy


def test_a_full_disk_in_a_worker_ends_the_study_which_goes_on_when_there_is_space(study, monkeypatch):
    cells = [cell(study, "dense", seed=seed) for seed in range(2)]
    monkeypatch.setattr("sparsemix.sweep.rounds.train_job", train_job_on_a_full_disk)
    with pytest.raises(OSError, match="No space left") as raised, one_worker() as workers:
        study.train(cells, workers, "training")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == "model.safetensors"
    monkeypatch.undo()
    with one_worker() as workers:
        assert all(study.train(cells, workers, "training")) and not study.failed


def train_job_on_a_full_disk(job):
    """In a worker: `train_job` where nothing can be saved."""
    from sparsemix import saved

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    saved.write = full
    return train_job(job)


def test_a_run_of_a_study_finds_the_studys_data(study):
    with one_worker() as workers:
        (record,) = study.train([cell(study, "dense")], workers, "training")
    shards = find_shards(record.folder, parse(RunConfig, record.settings), None)
    assert shards is not None and shards.manifest["fingerprint"] == study.data.fingerprint
