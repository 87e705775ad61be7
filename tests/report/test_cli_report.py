"""`sparsemix report` on folders as runs leave them: no torch, old runs, several folders, refusals in one line."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import yaml
from made_records import ARMS, made_study
from test_page import Page

import commands
from sparsemix.errors import DIVERGED

ONLY = {arm: ARMS[arm] for arm in ("dense", "mod")}


def write_runs(out, records):
    """A study's folder: plan.yaml and the runs with what a report reads of them."""
    cells = []
    for record in records:
        folder = out / "runs" / record.folder.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(record.settings), encoding="utf-8")
        (folder / "result.json").write_text(json.dumps(record.result), encoding="utf-8")
        lines = [{"flops": c, "wall_s": s, "validation_bpb": b} for c, s, b in record.curve]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        cells.append({"arm": record.arm, "run": folder.name, "role": record.role})
    plan = {"settings": {}, "cells": cells}
    (out / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def made():
    return made_study(ONLY, budgets=(1e13,), num_sizes=5, num_seeds=2)


@pytest.fixture
def study(made, tmp_path):
    return write_runs(tmp_path / "study", made)


@pytest.fixture
def no_pictures(monkeypatch):
    """Figures as CSV alone: drawing them takes most of the time and has tests of its own."""
    from sparsemix.report import study_page

    monkeypatch.setattr(study_page, "write_figure", lambda shape, folder: None)


def call(monkeypatch, capsys, *args):
    """(exit code, standard output, standard error) of one report."""
    return commands.call(monkeypatch, capsys, "report", *args)


def test_a_study_is_reported_from_its_runs_without_torch(study):
    shutil.rmtree(study / "runs" / yaml.safe_load((study / "plan.yaml").read_text())["cells"][0]["run"])
    code = (
        "import sys\n"
        "from sparsemix import cli\n"
        "sys.argv = ['sparsemix', 'report', sys.argv[1], '--markdown']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'a report needs no torch'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(study)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "| arm | budget |" in ran.stdout and f"report: {study / 'report.html'}" in ran.stderr
    page = Page((study / "report.html").read_text(encoding="utf-8"))
    folders = {link for link in page.links if link.startswith("./runs/")}
    assert folders and all((study / link.replace("%2B", "+")).is_dir() for link in folders)
    assert {path.suffix for path in (study / "figures").iterdir()} == {".svg", ".png", ".csv"}


def test_runs_from_before_results_held_a_cost_are_reported(study, no_pictures, monkeypatch, capsys):
    for folder in (study / "runs").iterdir():
        result = json.loads((folder / "result.json").read_text())
        size = result.pop("cost")["params"]
        del result["convention"]
        (folder / "result.json").write_text(json.dumps(result))
        header = json.dumps({"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    code, out, _ = call(monkeypatch, capsys, study)
    assert code == 0 and "mod" in out
    text = (study / "report.html").read_text(encoding="utf-8")
    assert 'id="size-forward_flops"' in text and 'id="size-active_params"' not in text, "old runs know no active size"


def test_several_folders_have_one_report_whose_links_lead_there(
    study, made, no_pictures, monkeypatch, capsys, tmp_path
):
    other = write_runs(tmp_path / "other", made_study(ONLY, budgets=(3e13,), num_sizes=5, num_seeds=2))
    code, _, err = call(monkeypatch, capsys, study, other)
    assert code == 2 and "--out" in err
    code, out, _ = call(monkeypatch, capsys, study, other, study, "--out", tmp_path / "both")
    assert code == 0 and "1e13" in out and "3e13" in out
    analysis = json.loads((tmp_path / "both" / "analysis.json").read_text())
    runs = {(r["arm"], r["role"], r["folder"]) for r in analysis["runs"]}
    assert len(analysis["runs"]) == len(runs), "a study that is named twice counts once"
    assert "report" in analysis["command"] and str(other) in analysis["command"]
    text = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "./../study/runs/" in text and "./../other/runs/" in text


def test_a_run_alone_is_reported_and_the_studys_command_is_kept(study, no_pictures, monkeypatch, capsys):
    run = next((study / "runs").glob("mod-*"))
    code, out, _ = call(monkeypatch, capsys, run, "--baseline", "mod")
    assert code == 0 and "no optimum" in out and (run / "report.html").is_file()
    (study / "analysis.json").write_text(json.dumps({"command": "sparsemix isoflop --kinds dense,mod"}))
    assert call(monkeypatch, capsys, study)[0] == 0
    assert json.loads((study / "analysis.json").read_text())["command"] == "sparsemix isoflop --kinds dense,mod"


@pytest.mark.parametrize("term", ["corpus", "FLOP convention"])
def test_runs_on_other_terms_are_refused_before_anything_is_written(study, term, monkeypatch, capsys):
    folder = next((study / "runs").glob("mod-*"))
    if term == "corpus":
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        settings["data"]["fingerprint"] = "another"
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    else:
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"convention": "Multiply-adds, one each."}))
    code, _, err = call(monkeypatch, capsys, study)
    assert code == 2 and f"{term} is" in err and err.count("\n") == 1
    assert not (study / "report.html").exists()


def test_what_is_no_finished_study_is_one_line(study, monkeypatch, capsys, tmp_path):
    for folder in (study / "runs").iterdir():
        (folder / "result.json").unlink()
    (tmp_path / "empty").mkdir()
    for place, says in (
        (study, "no finished run"),
        (tmp_path / "empty", "no finished run"),
        (tmp_path / "no", "no such"),
    ):
        code, _, err = call(monkeypatch, capsys, place)
        assert code == 2 and says in err and err.count("\n") == 1


def test_a_comparison_elsewhere_keeps_its_links(result, monkeypatch, capsys, tmp_path):
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "result.json").write_text(json.dumps(result), encoding="utf-8")
    code, out, _ = call(monkeypatch, capsys, tmp_path / "compared", "--out", tmp_path / "elsewhere")
    assert code == 0 and str(tmp_path / "elsewhere" / "report.html") in out
    text = (tmp_path / "elsewhere" / "report.html").read_text(encoding="utf-8")
    assert "./../compared/dense-0-ab12cd34ef/" in text


def test_runs_that_diverged_in_training_or_test_are_in_the_report(study, made, no_pictures, monkeypatch, capsys):
    names = dict.fromkeys(r.folder.name for r in made if r.arm == "mod" and r.role != "rate")
    tested, trained = (study / "runs" / name for name in list(names)[:2])
    held = json.loads((tested / "result.json").read_text())
    lost = dict.fromkeys(("bpb", "perplexity", "validation_bpb"), float("nan"))
    (tested / "result.json").write_text(json.dumps(held | lost))
    (trained / "result.json").unlink()
    (trained / "error.txt").write_text(f"step 7: {DIVERGED} (loss nan); largest weights: 3\n")
    code, out, err = call(monkeypatch, capsys, study)
    assert code == 0, err
    analysis = json.loads((study / "analysis.json").read_text())
    found = {run["folder"]: run["why"] for run in analysis["diverged"]}
    assert found == {tested.name: "its test loss is not finite", trained.name: f"step 7: {DIVERGED}"}
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "no verdict: runs of mod diverged" in page
    assert "there is no verdict on mod at this budget" in " ".join(out.split())
    assert tested.name in page and trained.name in page
    # One that goes on is unfinished, and no more.
    (trained / "error.txt").unlink()
    assert call(monkeypatch, capsys, study)[0] == 0
    assert len(json.loads((study / "analysis.json").read_text())["diverged"]) == 1
