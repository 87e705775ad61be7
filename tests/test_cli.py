"""The command line as a user meets it: one-line errors, exit codes, nothing half-written, nothing overwritten."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import call
from sparsemix.cli.app import app, spread_text


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
