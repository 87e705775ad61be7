"""A folder of many runs: shared, resumed, refused where it is another's."""

import json

import pytest

from sparsemix.config import ConfigError
from sparsemix.report.records import arm_of, read_run, read_runs, same_terms
from sparsemix.sweep.compare import CompareConfig
from sparsemix.sweep.local import pool
from sparsemix.sweep.study import Cell, Study
from tiny import run_config, write_corpus


@pytest.fixture
def study(tmp_path):
    made = Study(tmp_path / "study", CompareConfig(), lambda _: None)
    made.prepare(write_corpus(tmp_path))
    return made


def cell(study, kind, **settings):
    return Cell(kind, run_config(study.data, kind, **settings))


def test_cells_of_equal_settings_share_a_run_and_a_second_call_trains_nothing(study):
    same = [cell(study, "dense"), Cell("baseline", cell(study, "dense").config, "seed")]
    with pool(1, 1) as workers:
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
    with pool(1, 1) as workers:
        bad = cell(study, "dense", lr=1e30)
        records = study.train([bad, cell(study, "moe")], workers, "training")
    assert records[0] is None and records[1].arm == "moe"
    assert list(study.failed) == [bad.run] and "non-finite" in study.failed[bad.run]
    assert any(bad.run in line for line in said)


def test_other_settings_are_refused_and_name_what_differs(study):
    with pool(1, 1) as workers:
        study.train([cell(study, "dense")], workers, "training")
    Study(study.out, CompareConfig(), print)
    with pytest.raises(ConfigError, match="seeds=3 there, 5 asked"):
        Study(study.out, CompareConfig(seeds=5), print)


def test_runs_are_named_by_what_they_are_and_old_ones_are_read(study):
    with pool(1, 1) as workers:
        records = study.train([cell(study, kind) for kind in ("dense", "mh_moe", "nested")], workers, "training")
    assert [arm_of(r.settings) for r in records] == ["dense", "mh_moe", "mod+moe+peer+expert_choice"]
    old = records[0].folder
    result = json.loads((old / "result.json").read_text(encoding="utf-8"))
    del result["cost"], result["convention"]
    (old / "result.json").write_text(json.dumps(result), encoding="utf-8")
    before = read_run(old)
    assert before.params == records[0].params
    assert before.forward_flops == pytest.approx(records[0].forward_flops)
    same_terms([before, records[1]])


def test_runs_on_other_texts_are_not_compared(study, tmp_path):
    with pool(1, 1) as workers:
        records = study.train([cell(study, "dense"), cell(study, "moe")], workers, "training")
    records[1].settings["data"]["fingerprint"] = "other"
    with pytest.raises(ConfigError, match="corpus is"):
        same_terms(records)
