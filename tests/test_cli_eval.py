"""`sparsemix eval` as a user meets it: a table eighty columns wide, one-line errors, nothing half-written."""

import json
import sys

import pytest

import commands
from made_corpora import small_tokenizer, write_papers
from sparsemix import saved
from sparsemix.api import build_model
from tiny import BLOCKS, D, V, unchecked_shapes

NAMES = ("c4", "wikitext", "lambada", "pile", "curation", "redpajama")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    blocks = BLOCKS["mod"] * 2
    built = build_model({"d_model": D, "vocab_size": V, "seq_len": 16, "blocks": blocks})
    for name, parameter in built.named_parameters():
        if name.endswith("predictor.down.weight"):
            parameter.data *= 40
    saved.write(built, folder, small_tokenizer())
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_papers(folder)
    return folder


def call(monkeypatch, capsys, *args):
    """(exit code, standard output, standard error) of one `sparsemix eval`."""
    with unchecked_shapes():
        return commands.call(monkeypatch, capsys, "eval", *args)


def test_the_papers_table_fits_eighty_columns_and_names_every_corpus(monkeypatch, capsys, model, data, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SPARSEMIX_DATA", str(data))
    (data / "c4/validation.jsonl.gz").rename(data / "held")
    out = tmp_path / "result.json"
    code, said, err = call(monkeypatch, capsys, model, "--suite", "papers", "--out", out)
    (data / "held").rename(data / "c4/validation.jsonl.gz")
    assert code == 0, err
    lines = said.splitlines()
    for name in (*NAMES, "  per word", "  last word", "  github"):
        assert [line for line in lines if line.startswith(name)], name
    (absent,) = (line for line in lines if line.startswith("c4 "))
    assert "not available" in absent
    assert any(line.startswith("c4: not available: no file c4/validation* below") for line in lines)
    table = lines[: lines.index("")]
    assert len(table) == 12 and max(map(len, table)) <= 80
    assert any(line.startswith("corpus") and "blocks.1" in line and "blocks.3" in line for line in lines)
    assert "windows of 16 tokens, stride 8" in said and f"result: {out}" in said
    assert "eval: wikitext, windows" in err
    assert list(json.loads(out.read_text())["corpora"]) == list(NAMES)


def test_json_has_what_was_asked_for_and_stands_alone(monkeypatch, capsys, model, data):
    asked = [model, "--data-dir", data, "--stride", "4"]
    assert call(monkeypatch, capsys, *asked, "--only", "pile")[0] == 0
    code, said, err = call(monkeypatch, capsys, *asked, "--only", "c4,wikitext", "--max-documents", "3", "--json")
    assert code == 0
    result = json.loads(said)
    assert list(result["corpora"]) == ["c4", "wikitext"]
    assert result["corpora"]["c4"]["rows"][0]["documents"] == 3 and result["corpora"]["c4"]["asked"]["stride"] == 4
    assert list(json.loads((model / "eval.json").read_text())["corpora"]) == ["pile", "c4", "wikitext"]
    assert "result: " in err
    read = result["corpora"]["c4"]["read"]
    assert read["documents"] >= 3 and read["files"] == 1 and f"c4: {read['line']}" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--suite", "papres"], "did you mean 'papers'"),
        (["--only", "pille"], "did you mean 'pile'"),
        (["--data-dir", "nowhere"], "data_dir=nowhere is no folder"),
        (["--stride", "0"], "stride=0"),
        (["--stride", "99"], "stride=99 must be at most context=16"),
        (["--context", "99"], "context=99 must be at most the model's seq_len=16"),
        (["--max-documents", "0"], "max_documents=0"),
        (["--tokens", "0"], "max_tokens=0"),
        (["--limit", "3"], "--limit goes with --tasks only"),
        (["--tasks", "a", "--stride", "3"], "--stride goes with a suite only"),
        (["--tasks", "a", "--max-documents", "3"], "--max-documents goes with a suite only"),
        (["--out", "nowhere/eval.json"], "there is no folder nowhere"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path, model, args, says):
    monkeypatch.chdir(tmp_path)
    before = sorted(model.iterdir())
    code, out, err = call(monkeypatch, capsys, model, *args)
    assert code == 2 and not out
    assert len(err.splitlines()) == 1 and says in err
    assert not list(tmp_path.iterdir()) and sorted(model.iterdir()) == before


def test_a_folder_without_model_or_tokenizer_is_one_line(monkeypatch, capsys, tmp_path, model):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((model / name).read_bytes())
    for folder, says in ((tmp_path / "bare", "has no tokenizer"), (tmp_path, "is no model"), (tmp_path / "no", "no")):
        code, _, err = call(monkeypatch, capsys, folder)
        assert code == 2 and says in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["config.json", "model.safetensors"]


def test_ctrl_c_is_one_line_and_keeps_what_is_finished(monkeypatch, capsys, tmp_path, model, data):
    from sparsemix.evaluate import suite

    measure = suite.measure

    def interrupted(*args):
        if args[2] == "lambada":
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(suite, "measure", interrupted)
    out = tmp_path / "e.json"
    code, said, err = call(monkeypatch, capsys, model, "--data-dir", data, "--out", out)
    assert code == 130 and not said
    assert (
        err.splitlines()[-1] == f"sparsemix: interrupted; finished corpora are in {out}, and the same command resumes"
    )
    assert list(json.loads(out.read_text())["corpora"]) == ["c4", "wikitext"]


def test_numbers_are_rounded_to_their_standard_error():
    from sparsemix.report.eval_tables import measured

    shown = {
        (2.01334, 0.00412): "2.0133 ± 0.0041",
        (217.66, 8.123): "217.7 ± 8.1",
        (51900.0, 13964.0): "52000 ± 14000",
        (49369173.0, 57771509.0): "49.4 M ± 57.8 M",
        (3.5, None): "3.500 ± –",
        (0.0, 0.0): "0.0000 ± 0.0000",
        (None, None): "not finite",
    }
    for (value, error), text in shown.items():
        assert measured({"value": value, "error": error}).replace("\u00a0", " ") == text


def test_tasks_without_the_harness_say_how_to_install_it(monkeypatch, capsys, model):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "sparsemix.interop.harness", raising=False)
    code, out, err = call(monkeypatch, capsys, model, "--tasks", "hellaswag")
    assert code == 2 and not out
    assert err == "sparsemix: --tasks needs lm-evaluation-harness; install it: pip install 'sparsemix[eval]'\n"
