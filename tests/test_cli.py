"""The command line as a user meets it: one-line errors, exit codes, nothing half-written, nothing overwritten."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsemix import cli
from sparsemix.cli.app import app, spread_text
from sparsemix.errors import DIVERGED, TrainingError
from sparsemix.run import ERROR, Run

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
SMALL = ["--set", "train.test_tokens=3000", "--set", "train.eval_tokens=1000", "--set", "train.evals=1"]


def call(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command."""
    monkeypatch.setattr(sys, "argv", ["sparsemix", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code if isinstance(ended.value.code, int) else 0, said.out, said.err


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        line = " ".join(WORDS[(i * j + i // 3) % 8] for j in range(1, 200 + i))
        (folder / f"{i}.txt").write_text(f"document {i}\n{line}\n" * 2)
    return folder


def bad_files(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / name for name in ("latin.txt", "empty.txt", "cut.jsonl.gz", "short.txt", "odd.xyz")}
    files["latin.txt"].write_bytes(b"caf\xe9")
    files["empty.txt"].write_text("")
    whole = gzip.compress(json.dumps({"text": "word " * 9000}).encode())
    files["cut.jsonl.gz"].write_bytes(whole[: len(whole) // 2])
    files["short.txt"].write_text("one two\n\nthree four\n\nfive six\n")
    files["odd.xyz"].write_text("text")
    files["missing"] = tmp_path / "missing.txt"
    return files


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "no such file"),
        ("empty.txt", "no text"),
        ("latin.txt", "not UTF-8 at byte 3"),
        ("cut.jsonl.gz", "truncated or corrupt"),
        ("short.txt", "seq_len=128 must be below"),
        ("odd.xyz", "odd.xyz"),
    ],
)
def test_unreadable_text_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path, name, says):
    text = bad_files(tmp_path)[name]
    before = sorted(tmp_path.iterdir())
    code, out, err = call(monkeypatch, capsys, "compare", "--out", tmp_path / "out", "--text", text, "--budget", "1e12")
    errors = [line for line in err.splitlines() if not line.startswith("data: ")]
    assert code == 2
    assert not out
    assert len(errors) == 1
    assert says in errors[0]
    assert sorted(tmp_path.iterdir()) == before


BLOCK = "model.blocks.1.ffn."


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["compare", "--budget", "1e3"], "is less than one step"),
        (["compare", "--budget", "soon"], "budget=soon must be FLOPs"),
        (["compare", "--kinds", "dense,pear"], "did you mean 'peer'?"),
        (["compare", "--kinds", "moe"], "kinds=moe must hold dense"),
        (["compare", "--kinds", "moo"], "kinds=moo is none of dense, mod, moe"),
        (["compare", "--kinds", "moe,mod+moo"], "kinds=moo is none of dense, mod, moe"),
        (["compare", "--budget", "inf"], "budget=inf must be FLOPs"),
        (["compare", "--budget", "auto:3x"], "budget=auto:3x must be FLOPs"),
        (["compare", "--lr", "inf"], "lr=inf must be a positive number"),
        (["compare", "--set", "d_model=96"], "did you mean 'model.d_model'?"),
        (["compare", "--set", "model.blocks.each=3"], "it has count=4, each=3"),
        (["compare", "--set", "model.d_model=x"], "model.d_model=x input should be a valid integer"),
        (["isoflop", "--budgets", "1e12", "--sizes", "9" * 5000], "must name at least 3"),
        (["compare", "--kinds", "dense,moe@ternery"], "kinds=moe@ternery: 'ternery' is none of float, ternary"),
        (["compare", "--kinds", "dense,moo@ternary"], "kinds=moo is none of dense, mod, moe"),
        (["train", "tiny", "model.precision=ternery"], "did you mean 'ternary'?"),
        (["train", "tiny", "train.schedule=two_stages"], "train.schedule=two_stages"),
        (["compare", "--lr", "-1"], "lr=-1 must be"),
        (["compare", "--seeds", "0"], "seeds=0"),
        (["compare", "--recipe", "tinny"], "did you mean 'tiny'?"),
        (["compare", "--placement", "all"], "placement=all"),
        (["compare", "--set", "model.d_modl=3"], "did you mean 'd_model'?"),
        (
            ["train", "tiny", f"{BLOCK}kind=moe", f"{BLOCK}num_experts=4", f"{BLOCK}top_k=9", f"{BLOCK}d_ff=8"],
            "model.blocks.1.ffn.top_k=9 must lie in [1, num_experts=4]",
        ),
        (["train", "tiny-peer", "model.blocks.2.ffn.num_experts=10"], "must be a square; the nearest are 9 and 16"),
        (["train", "tiny-mod", "model.blocks.1.capacity=1.5"], "model.blocks.1.capacity=1.5"),
        (["train", "tiny-mod", "model.blocks.1.capacity=0"], "model.blocks.1.capacity=0"),
        (["train", "tiny", "model.blocks.9.mixer.num_heads=2"], "list position from 0 to 3"),
        (["train", "tiny", "train.budget_flops=1"], "is less than one step"),
        (["train", "tiny", "model.d_model=66"], "num_heads=4"),
        (["kinds", "moo"], "did you mean 'mo"),
        (["parity", "--heads", "5"], "num_heads=5 must divide d_model=768"),
        (["parity", "--d-ff", "100"], "leaves no width for experts"),
        (["train", "peer:L99"], "recipe=peer:L99 is none of 30k"),
    ],
)
def test_a_wrong_setting_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    where = [] if args[0] in ("kinds", "parity") else ["--out", tmp_path / "out"]
    code, _, err = call(monkeypatch, capsys, *args, *where)
    errors = [line for line in err.splitlines() if " steps of " not in line]
    assert code == 2, err
    assert len(errors) == 1
    assert says in errors[0]
    assert not list(tmp_path.iterdir())


def test_help_answers_without_torch(tmp_path):
    code = (
        "import sys; from sparsemix import cli; sys.argv = ['sparsemix', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=tmp_path)


def test_kinds_and_recipes_are_listed(monkeypatch, capsys):
    _, out, _ = call(monkeypatch, capsys, "kinds")
    for name in ("attention", "block", "dense", "moe", "pkm", "peer", "mh_moe", "mod", "num_experts", "MFLOPs"):
        assert name in out
    assert "float, ternary" in out
    _, out, _ = call(monkeypatch, capsys, "recipes")
    assert "tiny" in out
    assert "small" in out


def test_reproductions_are_listed_with_what_came_out(monkeypatch, capsys, tmp_path):
    code, before, _ = call(monkeypatch, capsys, "reproduce", "--list", "--out", tmp_path)
    assert code == 0 and "peer-table2" in before and "came out" not in before
    (tmp_path / "mod-fig5").mkdir()
    outcomes = ["reproduced", "not resolved at this scale", "reproduced"]
    trends = [{"claim": "c", "outcome": outcome, "evidence": "e"} for outcome in outcomes]
    (tmp_path / "mod-fig5" / "result.json").write_text(json.dumps({"trends": trends}))
    _, after, _ = call(monkeypatch, capsys, "reproduce", "--list", "--out", tmp_path)
    assert "came out" in after and "2 reproduced" in after


def test_parity_prints_the_published_sizes_and_a_layer_that_builds(monkeypatch, capsys):
    import yaml

    from sparsemix.api import build_layer

    code, out, _ = call(monkeypatch, capsys, "parity", "--d-model", 768, "--d-ff", 2048, "--heads", 3)
    assert code == 0
    cells = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert cells["inner width"][-3:] == ["2048", "512", "512.000"]
    assert cells["experts"][-3:] == ["8", "96", "93.000"]
    assert "+0.000%" in cells["MFLOPs a token, without the gate"]
    assert "+3.125%" in cells["parameters, without the gate"]
    settings = yaml.safe_load(out.splitlines()[-1])
    assert settings["inner"]["num_experts"] == 96
    build_layer(settings, 768)
    code, out, _ = call(monkeypatch, capsys, "parity", "--d-model", 24, "--d-ff", 64, "--plain", "--time")
    assert code == 0 and "time a token" in out and " x " in out


def diverges(monkeypatch, capsys, out, asked, before):
    """One seed's test loss is no number, another's training diverged: both are results of the comparison."""
    mod, ternary = (out / row["runs"][1]["folder"] for row in before[1:])
    with np.load(mod / "documents.npz") as file:
        held = dict(file)
    held["nats"][3] = np.nan
    np.savez(mod / "documents.npz", **held)
    run = Run(mod)
    run.finish(json.loads((mod / "result.json").read_text()) | dict.fromkeys(("bpb", "perplexity"), np.nan))
    whole = (ternary / "result.json").read_bytes()
    (ternary / "result.json").unlink()
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
    np.savez(run.folder / "documents.npz", **{name: held[name] for name in held})
    run.finish(json.loads((run.folder / "result.json").read_text()))
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


def test_every_command_that_reads_text_reads_further_suffixes_when_asked():
    from typer.main import get_command

    commands = get_command(app).commands
    given = {name: {o for p in command.params for o in p.opts} for name, command in commands.items()}
    readers = {name for name, options in given.items() if "--text" in options}
    assert readers == {"compare", "convert", "inspect", "isoflop", "reproduce", "train"}
    assert all("--text-as" in given[name] for name in readers)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("compare --text a b --out o", "compare --text a --text b --out o"),
        ("train tiny x=1 --text a b c", "train tiny x=1 --text a --text b --text c"),
        ("compare --text a --text b --out o", "compare --text a --text b --out o"),
        ("compare --text --out o", "compare --text --out o"),
        ("compare --out o x", "compare --out o x"),
    ],
)
def test_text_takes_several_words(typed, meant):
    assert spread_text(typed.split()) == meant.split()


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
