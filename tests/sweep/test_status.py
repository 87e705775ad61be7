"""Where the runs of a folder stand, as another terminal sees it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsemix.config import ConfigError
from sparsemix.report.records import read_runs
from sparsemix.run import LOCK, Run
from sparsemix.sweep import status
from sparsemix.sweep.compare import CompareConfig
from sparsemix.sweep.launch import make_launcher
from sparsemix.sweep.status import Board, cells_of, duration, last_line, look, table
from sparsemix.sweep.study import Cell, Study
from tiny import run_config, write_corpus

STATUS = """
import sys
from pathlib import Path
from sparsemix.cli.status import status
status(Path(sys.argv[1]))
assert "torch" not in sys.modules
"""


def one_worker():
    return make_launcher("local", Path("unused"), ["threads=1"], 1)


@pytest.fixture
def study(tmp_path):
    made = Study(tmp_path / "study", CompareConfig(), lambda _: None)
    made.prepare(write_corpus(tmp_path))
    return made


def cell(study, kind, **settings):
    return Cell(kind, run_config(study.data, kind, **settings))


def test_status_shows_a_half_done_study_and_needs_no_torch(study):
    done, failed, going, stopped, waiting = (cell(study, "dense", seed=seed, evals=0) for seed in range(5))
    failed = Cell("broken", failed.config.replace(train=failed.config.train.replace(lr=1e30)))
    with one_worker() as workers:
        study.train([done, failed], workers, "training")
    study._note([going, stopped, waiting])
    for each in (going, stopped):
        run = Run(study.folder(each), each.config)
        budget = each.config.train.budget_flops
        run.log(step=1, loss=5.5, flops=0.25 * budget, wall_s=2.0, tokens=64, tokens_per_s=32.0)
    long_ago = time.time() - 600
    os.utime(study.folder(stopped) / "metrics.jsonl", (long_ago, long_ago))
    with Run(study.folder(going)).lock():
        command = [sys.executable, "-c", STATUS, str(study.out)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        states = {run.folder.name: run for run in Board(cells_of(study.out)).look()}
    expected = {done: "done", failed: "failed", going: "running", stopped: "stopped", waiting: "waiting"}
    assert {each.run: states[each.run].state for each in expected} == {e.run: state for e, state in expected.items()}
    assert states[going.run].share == 0.25 and states[going.run].left_s == pytest.approx(6.0)
    assert states[waiting.run].budget == waiting.config.train.budget_flops and states[waiting.run].width == 16
    for each, state in expected.items():
        # A long reason goes on below its row, and may name the folder again.
        (row,) = [line for line in told.splitlines() if each.run in line and line.startswith(each.arm)]
        assert f" {state} " in row and len(row) <= 160
    assert "25%  5.500" in told and "non-finite" in told
    assert "1 of 5 runs done, 1 running, 1 failed, 1 stopped, 1 waiting, about" in told
    # Where there is no room for all, what runs or failed comes first.
    short = table(list(states.values()), 2)
    assert short.row_count == 2 and short.caption == "and 3 more"


def test_a_run_on_another_machine_whose_lock_is_not_seen_runs_while_it_writes(study):
    run = Run(study.folder(one := cell(study, "dense")), one.config)
    run.log(step=1, loss=5.5, flops=1.0, wall_s=2.0, tokens=64, tokens_per_s=32.0)
    (run.folder / LOCK).write_text("process 7 on elsewhere\n", encoding="utf-8")
    assert look(run.folder, {}).state == "running"
    with run.lock():
        pass
    assert look(run.folder, {}).state == "stopped"


def test_status_of_a_comparison_of_one_run_and_of_nothing(study, tmp_path):
    one = cell(study, "moe")
    with one_worker() as workers:
        study.train([one], workers, "training")
    for folder in (study.out / "runs", study.folder(one)):
        ((found, about),) = cells_of(folder)
        run = look(found, about)
        assert (run.arm, run.width, run.state) == ("moe", 16, "done") and "bits/byte" in run.said
    with pytest.raises(ConfigError, match="holds no runs; name the folder"):
        cells_of(tmp_path / "nothing")


def test_a_duration_reads_well_at_every_length():
    assert [duration(s) for s in (4, 99, 240, 5000, 7200, 90_000, 400_000)] == [
        "4 s",
        "99 s",
        "4 min",
        "83 min",
        "2.0 h",
        "25.0 h",
        "4.6 days",
    ]


def test_the_newest_line_is_read_whatever_its_length_and_a_torn_one_is_none_yet(study):
    run = Run(study.folder(one := cell(study, "dense")), one.config)
    path = run.folder / "metrics.jsonl"
    assert last_line(run.folder) is None
    path.write_text("")
    assert last_line(run.folder) is None
    known = {"loss": 5.5, "flops": 1.0, "wall_s": 0.0, "tokens": 64, "tokens_per_s": 32.0}
    for step, length in enumerate((10, 8191, 8192, 9628, 65_536, 200_000), 1):
        run.log(**known, step=step, blocks="x" * length)
        assert last_line(run.folder)["step"] == step
        with path.open("a") as file:
            file.write('{"step": 9, "lo')
        assert last_line(run.folder)["step"] == step and look(run.folder, {}).loss == 5.5
        path.write_bytes(path.read_bytes()[: -len('{"step": 9, "lo')])
    for torn in (b'{"step"\n', b"[]\n", b"\xff\x00\n", b'{"step": 0}\n', b"[" * 100_000 + b"\n"):
        path.write_bytes(torn)
        assert last_line(run.folder) is None and look(run.folder, {}).loss is None


def test_a_damaged_run_is_named_and_stops_neither_status_nor_report_for_the_rest(study):
    cells = [cell(study, "dense", seed=seed, evals=0) for seed in range(2)]
    with one_worker() as workers:
        study.train(cells, workers, "training")
    bad, good = (study.folder(each) for each in cells)
    (bad / "documents.npz").write_bytes(b"half")
    said = []
    assert [record.folder for record in read_runs([study.out], said.append)] == [good]
    assert len(said) == 1 and "documents.npz has 4 of" in said[0]
    for file, content in (
        ("result.json", "{"),
        ("result.json", "[1]"),
        ("config.yaml", ""),
        ("config.yaml", "model: 3"),
    ):
        whole = (bad / file).read_text()
        (bad / file).write_text(content)
        # A run's settings never change while a process looks.
        status._about.cache_clear()
        assert [run.state for run in Board(cells_of(study.out)).look()] == ["damaged", "done"]
        assert [record.folder for record in read_runs([study.out], said.append)] == [good]
        (bad / file).write_text(whole)
    plan = study.out / "plan.yaml"
    plan.write_text(plan.read_text().replace("seed: 1", "seed: 2"))
    for read in (cells_of, lambda out: read_runs([out])):
        with pytest.raises(ConfigError, match=r"plan\.yaml is damaged"):
            read(study.out)
