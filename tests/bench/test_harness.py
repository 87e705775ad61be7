"""The command: names, the file it writes, floors, and works that fail or are interrupted."""

import io
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from works import FAKE, case, squaring

from sparsemix.bench import harness
from sparsemix.bench.ceilings import read_rows, read_sequential
from sparsemix.bench.command import bench
from sparsemix.bench.floors import FLOORS
from sparsemix.bench.page import BEGIN, END, write_page
from sparsemix.bench.tables import console_tables, floor_of, verdict
from sparsemix.bench.work import number_row
from sparsemix.config import ConfigError

NOW = datetime(2026, 11, 24, 19, 0, tzinfo=UTC)


def result_of(*cases, name="fake"):
    result = harness.about("sparsemix bench", 2, False, NOW)
    record = {"about": "a fake", "said": "ok", "seconds": 0.1, "kernels": {}, "cases": list(cases)}
    return result | {"works": {name: record}}


def floored(id="peer_step/512 tokens", value=9.0):
    row = number_row(id, "times as fast as a peer", value)
    return {"name": "512 tokens", "settings": {}, "amounts": {}, "contenders": {}, "numbers": [row]}


def test_an_unknown_name_is_one_line_that_names_the_nearest(capsys):
    with pytest.raises(ConfigError, match=r"peer_stp is none of .*peer_step.*did you mean 'peer_step'"):
        bench(only=["peer_stp"])
    assert "Traceback" not in capsys.readouterr().err


def test_a_named_work_brings_the_ceilings_along():
    known = ["ceilings", "a", "b"]
    assert harness.chosen(["b"], known) == ["ceilings", "b"]
    assert harness.chosen([], known) == known


def test_every_floor_belongs_to_a_work_and_no_work_claims_another():
    from sparsemix.bench.works import WORKS

    claimed = [id for work in WORKS.values() for id in work.floors]
    assert sorted(claimed) == sorted(FLOORS)
    assert all(id.startswith(f"{work.name}/") for work in WORKS.values() for id in work.floors)


@pytest.mark.parametrize(
    ("id", "value", "said"),
    [
        ("peer_step/512 tokens", 7.9, "missed"),
        ("peer_step/512 tokens", 8.0, "met"),
        ("peer_step/512 tokens", 15.0, "met, goal too"),
        ("peer_memory/full moments", 0.66, "missed"),
        ("peer_memory/full moments", 0.64, "met"),
        ("peer_memory/full moments", 0.60, "met, goal too"),
        ("dense_step/training step", 1.0, "met"),
        ("no floor", 3.0, ""),
    ],
)
def test_a_floor_is_met_missed_or_absent(id, value, said):
    row = number_row(id, "", value)
    assert verdict(row) == said
    assert bool(floor_of(row)) == (id in FLOORS)


def test_a_refused_number_neither_meets_nor_misses_its_floor():
    row = number_row("peer_step/512 tokens", "", None, "peer: output differs")
    assert row["met"] is None and verdict(row) == ""


def test_a_share_is_the_time_at_the_ceilings_over_the_time_taken():
    ceiling = {
        "name": "random_rows",
        "amounts": {},
        "contenders": {},
        "numbers": [number_row("ceilings/random_rows", "B/s", 100.0)],
    }
    timed = {"name": "reads", "amounts": {"random_rows": 50.0}, "contenders": {"ours": {"min_s": 2.0}}, "numbers": []}
    works = {"ceilings": {"cases": [ceiling]}, "fake": {"cases": [timed]}}
    harness.with_shares(works)
    assert timed["share_of_ceilings"] == pytest.approx(0.25)


@pytest.mark.parametrize("compiler", ["cc", "none"])
def test_the_reading_ceilings_read_everything(monkeypatch, compiler):
    import torch

    if compiler == "none":
        monkeypatch.setenv("SPARSEMIX_CC", "none")
    table, ids = torch.randn(50, 37), torch.tensor([3, 49, 0, 3])
    for count in (1, 4, 8, 19):
        some = ids.repeat(5)[:count]
        torch.testing.assert_close(read_rows(table, some), table[some].sum(1))
    torch.testing.assert_close(read_sequential(table).sum(), table.sum())


def fake_worker(monkeypatch, tmp_path, body):
    """Makes the harness start `body` in place of a work; its arguments are as a work's."""
    script = tmp_path / "worker.py"
    script.write_text(f"import json, pathlib, sys, time\nname, file, *_ = sys.argv[1:]\n{body}", encoding="utf-8")
    start = subprocess.Popen

    def popen(command, **settings):
        is_work = command[1:3] == ["-m", "sparsemix.bench"]
        return start([sys.executable, str(script), *command[3:]] if is_work else command, **settings)

    monkeypatch.setattr(harness.subprocess, "Popen", popen)


WRITE = 'pathlib.Path(file).write_text(json.dumps({"about": "", "said": "interrupted", "cases": [1], "at": "one"}))\n'


def test_a_work_that_fails_is_a_line_and_keeps_its_cases(monkeypatch, tmp_path):
    fake_worker(monkeypatch, tmp_path, WRITE + 'raise RuntimeError("boom")')
    record = harness.one("fake", 1, True, lambda at: None)
    assert record["said"] == "failed: RuntimeError: boom" and record["cases"] == [1]


def test_an_interrupted_work_keeps_its_cases_and_the_file_is_written(monkeypatch, tmp_path):
    fake_worker(monkeypatch, tmp_path, WRITE + "time.sleep(60)")

    def interrupt(at):
        if "one" in at:
            raise KeyboardInterrupt

    result = result_of() | {"works": {}, "quick": True}
    monkeypatch.setattr(harness, "with_shares", lambda works: None)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        harness.run(["fake", "never"], result, 1, interrupt, tmp_path / "out.json")
    assert time.monotonic() - began < 30
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["works"]["fake"]["cases"] == [1] and "never" not in written["works"]


def test_failures_and_disagreements_are_named_but_a_missing_peer_is_not():
    gone = number_row("fake/gone", "", None, "peer: not available: pip install")
    wrong = number_row("fake/wrong", "", None, "peer: output differs")
    result = result_of({"name": "x", "contenders": {}, "amounts": {}, "numbers": [gone, wrong]})
    result["works"]["broken"] = {"about": "", "said": "failed: boom", "cases": []}
    assert harness.broken(result) == ["broken failed: boom", "fake/wrong refused: peer: output differs"]


def test_the_result_says_where_it_was_measured():
    result = result_of(floored())
    wanted = {"schema", "created", "command", "commit", "hardware", "threads", "quick", "versions", "works"}
    assert result.keys() == wanted
    assert result["versions"]["torch"] and "PEER-pytorch" in result["versions"]
    assert harness.unmeasured(result) == [id for id in FLOORS if id != "peer_step/512 tokens"]


def test_tables_show_values_refusals_and_failures():
    from rich.console import Console

    result = result_of(floored(value=9.0), case(peer=squaring(factor=2.0)).measure(quick=True))
    result["works"]["broken"] = {"about": "never ran", "said": "failed: boom", "cases": []}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(console_tables(result))
    text = console.export_text()
    for part in ("≥ 8 (15)", "met", "output differs", "failed: boom", "ours"):
        assert part in text


def test_the_page_is_written_anew_but_keeps_what_was_written_by_hand(tmp_path):
    source, page = tmp_path / "result.json", tmp_path / "performance.md"
    source.write_text(json.dumps(result_of(floored(value=2.0))), encoding="utf-8")
    write_page(source, page)
    text = page.read_text(encoding="utf-8")
    assert "| missed |" in text and "0 of 1 measured floors are met" in text and "Not measured in this run" in text
    page.write_text(text.replace("Nothing was noted yet.", "Missed because of\nthe memory."), encoding="utf-8")
    source.write_text(json.dumps(result_of(floored(value=20.0))), encoding="utf-8")
    figure = (tmp_path / "performance" / "floors.svg").read_bytes()
    write_page(source, page)
    again = page.read_text(encoding="utf-8")
    assert again.partition(BEGIN)[2].partition(END)[0].strip() == "Missed because of\nthe memory."
    assert "| met, goal too |" in again and (tmp_path / "performance" / "floors.svg").read_bytes() != figure


def test_a_page_of_anything_else_is_one_line(tmp_path):
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no result of"):
        write_page(tmp_path / "other.json", tmp_path / "performance.md")


def test_the_default_file_lies_in_the_results_of_a_checkout_or_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert harness.default_path(NOW) == Path("bench-2026-11-24-1900.json")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert harness.default_path(NOW) == Path("bench/results/2026-11-24-1900.json")


def test_a_work_runs_as_a_worker_does(monkeypatch, tmp_path):
    from sparsemix.bench import __main__ as worker

    threads = worker.torch.get_num_threads()
    monkeypatch.setattr(worker, "WORKS", {"fake": FAKE})
    worker.main("fake", str(tmp_path / "record.json"), str(threads), "quick")
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["said"] == "ok" and [c["name"] for c in record["cases"]] == ["squares"]


def test_a_file_that_holds_results_is_added_to_unless_they_are_of_another_machine(tmp_path):
    now = datetime.now(UTC)
    result = harness.about("sparsemix bench", 2, True, now)
    file = tmp_path / "result.json"
    assert harness.continued(file, result) == result
    file.write_text(json.dumps(result | {"works": {"one": {"cases": [1]}}}), encoding="utf-8")
    assert harness.continued(file, result)["works"] == {"one": {"cases": [1]}}
    with pytest.raises(ConfigError, match="holds results with threads=2, not 1; choose another file"):
        harness.continued(file, harness.about("sparsemix bench", 1, True, now))
