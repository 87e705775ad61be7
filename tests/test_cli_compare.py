"""`sparsemix compare` from its text to its report, and what is told of it where something is in the way."""

import json
from pathlib import Path

import numpy as np
import pytest

from commands import call
from sparsemix.durable import SEAL
from sparsemix.errors import DIVERGED, TrainingError
from sparsemix.run import ERROR, Run

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
SMALL = ["--set", "train.test_tokens=3000", "--set", "train.eval_tokens=1000", "--set", "train.evals=1"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        line = " ".join(WORDS[(i * j + i // 3) % 8] for j in range(1, 200 + i))
        (folder / f"{i}.txt").write_text(f"document {i}\n{line}\n" * 2)
    return folder


def diverges(monkeypatch, capsys, out, asked, before):
    """One seed's test loss is no number, another's training diverged: both are results of the comparison."""
    mod, ternary = (out / row["runs"][1]["folder"] for row in before[1:])
    with np.load(mod / "documents.npz") as file:
        held = dict(file)
    held["nats"][3] = np.nan
    np.savez(mod / "documents.npz", **held)
    run = Run(mod)
    no_loss = dict.fromkeys(("bpb", "perplexity"), np.nan)
    run.finish(json.loads((mod / "result.json").read_text()) | no_loss)
    whole = (ternary / "result.json").read_bytes()
    # Checksums come with the result.
    for name in ("result.json", SEAL):
        (ternary / name).unlink()
    (ternary / ERROR).write_text(f"step 3: {DIVERGED} (loss nan)\n")
    lost = {ternary: TrainingError(f"step 3: {DIVERGED} (loss nan)")}
    monkeypatch.setattr("sparsemix.sweep.compare.train_all", lambda *_: lost)
    code, said, err = call(monkeypatch, capsys, *asked)
    assert code == 1 and f"{ternary.name}: step 3: {DIVERGED}" in err.splitlines()[-1]
    rows = {row["kind"]: row for row in json.loads((out / "result.json").read_text())["rows"]}
    for kind, why in (("mod", "its test loss is not finite"), ("moe@ternary", f"step 3: {DIVERGED}")):
        row = rows[kind]
        assert row["verdict"].startswith("diverged: 1 of 2 seeds; the mean of the other, ")
        assert row["bpb"] is row["perplexity"] is row["difference"] is row["p_value"] is None
        assert [run["diverged"] for run in row["runs"]] == [None, why]
        page = (out / "report.html").read_text()
        for shown in (" ".join(said.split()), page):
            assert f"{kind}: 1 of 2 runs diverged (seed 1: {why}); " in shown
        assert f"<b>{kind}</b> – –: diverged" in page
    assert rows["dense"] == before[0]
    assert call(monkeypatch, capsys, "report", out, "--markdown")[0] == 0
    # Where the baseline itself diverged nobody is judged.
    run = Run(out / before[0]["runs"][0]["folder"])
    np.savez(run.folder / "documents.npz", **held)
    run.finish(json.loads((run.folder / "result.json").read_text()) | no_loss)
    lost.clear()
    (ternary / "result.json").write_bytes(whole)
    assert call(monkeypatch, capsys, *asked)[0] == 0
    verdicts = {row["kind"]: row["verdict"] for row in json.loads((out / "result.json").read_text())["rows"]}
    assert verdicts["dense"].startswith("diverged: 1 of 2") and verdicts["moe@ternary"] == "not judged: dense diverged"


def test_compare_writes_a_report_resumes_and_guards_its_folder(monkeypatch, capsys, tmp_path, corpus):
    out = tmp_path / "out"
    (corpus / "59.txt").rename(corpus / "59.asc")
    (corpus / "cover.png").write_bytes(b"\0")
    asked = ["compare", "--out", out, "--text", corpus, "--text-as", ".asc", "--kinds", "dense,mod,moe@ternary"]
    asked += ["--seeds", "2", "--budget", "1e10"]
    code, said, err = call(monkeypatch, capsys, *asked, *SMALL)
    assert code == 0, err
    assert "report: " in said
    (line,) = (line for line in err.splitlines() if line.startswith("read: "))
    assert "read: 60 files, " in line and line.endswith(f"skipped: 1 .png (not text, {corpus / 'cover.png'})")
    assert line in (out / "report.html").read_text()
    result = json.loads((out / "result.json").read_text())
    dense, mod, ternary = result["rows"]
    assert [row["kind"] for row in result["rows"]] == ["dense", "mod", "moe@ternary"]
    assert {run["folder"].split("-")[0] for run in ternary["runs"]} == {"moe@ternary"}
    assert ternary["bytes_per_token"] < dense["bytes_per_token"] < ternary["params"] * 4
    assert [line for line in result["fairness"] if line.startswith("KIND@ternary")]
    assert any("moe@ternary" in line and "precision ternary" in line for line in result["fairness"])
    assert {"bpb", "bpb_ci", "perplexity", "verdict", "flops_per_token", "params", "active_params"} <= set(mod)
    assert {"bytes_per_token", "tokens", "tokens_per_s", "peak_memory_bytes", "wall_s"} <= set(mod)
    assert set(result["baselines"]) == {"uniform_bpb", "unigram_bpb", "bigram_bpb", "fivegram_bpb"}
    assert result["baselines"]["uniform_bpb"] > result["baselines"]["unigram_bpb"] > result["baselines"]["bigram_bpb"]
    assert mod["lookahead_bpb"] is not None
    assert mod["leak"] == pytest.approx(mod["lookahead_bpb"] - sum(r["bpb"] for r in mod["runs"]) / 2)
    assert sum(mod["routing"]["passes"]) == result["corpus"]["evaluated"]["tokens"]
    assert "untuned" in mod["verdict"]
    assert any("every other block" in line for line in result["fairness"])
    assert (out / "report.html").stat().st_size > 10_000
    for row in result["rows"]:
        for run in row["runs"]:
            assert (out / run["folder"] / "model" / "model.safetensors").is_file()
            assert row["bpb_ci"][0] <= row["bpb"] <= row["bpb_ci"][1]
    # Every run spent the same budget, to within one step.
    folders = [out / run["folder"] for row in result["rows"] for run in row["runs"]]
    spent = [json.loads((folder / "result.json").read_text())["flops"] for folder in folders]
    assert max(spent) <= 1e10
    assert min(spent) > 0.75 * 1e10

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    code, _, err = call(monkeypatch, capsys, *asked, *SMALL)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == stamps  # nothing trained again
    assert json.loads((out / "result.json").read_text())["rows"] == result["rows"]

    before = (out / "plan.yaml").read_text()
    code, _, err = call(monkeypatch, capsys, *asked, *SMALL, "--lr", "0.1")
    assert code == 2
    assert "lr=rule there, 0.1 asked" in err
    assert (out / "plan.yaml").read_text() == before

    (out / "report.html").unlink()
    code, said, _ = call(monkeypatch, capsys, "report", out, "--markdown")
    assert code == 0
    assert (out / "report.html").is_file()
    assert f"| mod | {mod['bpb']:.4f} |" in said
    assert result["corpus"]["fingerprint"] in said
    diverges(monkeypatch, capsys, out, [*asked, *SMALL], result["rows"])


def test_a_dry_run_says_the_plan_and_keeps_the_text_alone(monkeypatch, capsys, tmp_path, corpus):
    asked = ["compare", "--out", tmp_path / "out", "--text", corpus, "--kinds", "dense,moe", "--seeds", "2"]
    code, out, err = call(monkeypatch, capsys, *asked, "--budget", "1e10", "--dry-run", *SMALL)
    assert code == 0, err
    assert not out
    assert "4 runs (2 seeds a kind), 4e+10 training FLOPs" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data"]


def test_a_run_is_named_by_its_rate_where_rates_are_tried(tmp_path):
    from sparsemix.config import config_hash, parse
    from sparsemix.sweep.compare import CompareConfig, Comparison, kind_config
    from sparsemix.sweep.launch import make_launcher

    for lr, name in (("sweep", "moe-lr0.005-1-"), ("rule", "moe-1-")):
        settings = parse(CompareConfig, {"kinds": ("dense", "moe"), "lr": lr})
        comparison = Comparison(settings, tmp_path, print, make_launcher("local", tmp_path, (), None, most=1))
        config = kind_config(settings, "moe", comparison._data_config(), 1e12)
        config = config.replace(seed=1, train=config.train.replace(lr=0.005))
        plain = tmp_path / f"moe-1-{config_hash(config)}"
        assert comparison._job("moe", config).folder.name == f"{name}{config_hash(config)}"
        plain.mkdir()
        assert comparison._job("moe", config).folder == plain, "folders of earlier versions keep their names"
        plain.rmdir()


def test_ctrl_c_says_that_the_same_command_resumes(monkeypatch, capsys, tmp_path, corpus):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsemix.sweep.compare.Comparison.run", interrupted)
    code, _, err = call(monkeypatch, capsys, "compare", "--out", tmp_path / "out", "--text", corpus)
    assert code == 130
    assert err == "sparsemix: interrupted; what was done is saved, and the same command resumes\n"


def test_a_text_of_no_whole_window_is_refused_before_anything_is_trained(monkeypatch, capsys, tmp_path, corpus):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(corpus.iterdir())[:4]:
        path.rename(few / path.name)
        (few / path.name).write_text(path.name)
    code, _, err = call(monkeypatch, capsys, "compare", "--out", tmp_path / "out", "--text", few, "--budget", "1e11")
    assert code == 2
    assert "seq_len=128 must be below the training split's" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_not_touched(monkeypatch, capsys, tmp_path, corpus):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for command in (["compare", "--budget", "1e10"], ["train", "tiny", "train.budget_flops=1e10"]):
        code, _, err = call(monkeypatch, capsys, *command, "--text", corpus, "--out", out)
        assert code == 2
        assert "not empty" in err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
