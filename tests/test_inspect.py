"""`sparsemix inspect` as a user meets it: real runs, every kind of layer, wrong input."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest

from sparsemix import cli
from sparsemix.data import Shards, prepare
from sparsemix.train import train
from tiny import BLOCKS, MH_MOE, PEER, T, block, mod, run_config, unchecked_shapes, write_corpus

RUNS = {
    "dense": BLOCKS["dense"],
    "peer": BLOCKS["peer"],
    "mixed": [block(MH_MOE), mod(block(PEER), capacity=0.5), mod(block(BLOCKS["dense"][0]["ffn"]))],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trained runs with their data beside them."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_corpus(folder)
    shards = prepare(data, folder / "data")
    with unchecked_shapes():
        for name, blocks in RUNS.items():
            train(run_config(data, blocks, steps=12, lr=0.02), folder / name, shards)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*args):
        """(exit code, standard output, standard error)"""
        monkeypatch.setattr(sys, "argv", ["sparsemix", "inspect", *map(str, args)])
        with pytest.raises(SystemExit) as ended, unchecked_shapes():
            cli.main()
        said = capsys.readouterr()
        return ended.value.code if isinstance(ended.value.code, int) else 0, said.out, said.err

    return run


def test_a_run_is_inspected_on_its_own_test_split(runs, call, tmp_path):
    code, out, err = call(runs / "mixed", "--tokens", 300, "--out", tmp_path / "seen")
    assert code == 0, err
    assert "inspect: measuring mixed" in err
    for said in ("Use of the experts", "Evenness", "Mixture-of-Depths", "Correlation", "mh_moe / moe", "sub-token"):
        assert said in out
    (run,) = json.loads((tmp_path / "seen" / "inspect.json").read_text())["runs"]
    assert run["tokens"] == 300 and run["kinds"] == ["mh_moe", "mod", "moe", "peer"]
    heads, inside = run["experts"]["blocks.0.ffn.inner"], run["experts"]["blocks.1.inner.ffn"]
    assert heads["rows"] == 600 and heads["tokens"] == 300 and heads["picks_per_token"] == 4
    # The layer inside Mixture-of-Depths saw the tokens that were routed, 8 picks each.
    assert inside["tokens"] == round(300 * run["mod"]["blocks.1"]["routed_rate"]) and inside["rows"] == inside["tokens"]
    assert not inside["tokens"] or inside["picks_per_token"] == 8
    assert sum(heads["gate_histogram"]) == 1200 and sum(run["passes"]) == 300
    assert sum(run["mod"]["blocks.2"]["weights"]) == sum(run["mod"]["blocks.2"]["guess"]["counts"]) == 300
    plain, *routed = run["map"]["blocks"]
    assert plain == [1] * 128 and {taken for block in routed for taken in block} == {0, 1}
    shards = Shards.open(runs / "data")
    assert "".join(run["map"]["texts"]) == shards.tokenizer().decode(shards.tokens("test")[:128].tolist())
    assert {at["depth"] for at in run["loss_by_depth"]} <= {0, 1, 2}
    assert {"depth", "blocks.0.ffn.inner.top_gate", "blocks.2.scores", "blocks.2.routed"} <= set(run["correlation"])
    page = (tmp_path / "seen" / "inspect.html").read_text()
    assert page.count("<svg role") == len(list((tmp_path / "seen").glob("*.png"))) >= 9
    for path in (tmp_path / "seen").glob("*.png"):
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[:2] == (640, 1120) and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_json_alone_is_on_standard_output_and_text_is_measured_from_its_start(runs, call, tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("the cat sees one red hat. " * 400)
    place = tmp_path / "seen"
    code, out, err = call(runs / "peer", "--text", text, "--tokens", 200, "--out", place, "--json")
    assert code == 0
    assert out == (place / "inspect.json").read_text() + "\n"
    (run,) = json.loads(out)["runs"]
    assert run["tokens"] == 200 and run["documents"] == 1 and run["text"] == [str(text)]
    assert run["read"].startswith("read: 1 file, 10.4 kB, 1 document, ") and run["read"] in err
    assert run["read"] in (place / "inspect.html").read_text()
    assert run["correlation"]["blocks.1.ffn.top_gate"]["loss"]["pearson_ci"] is None
    again = json.loads(call(runs / "peer", "--text", text, "--tokens", 200, "--out", place, "--json")[1])
    assert again["runs"] == [run]


def test_usage_on_few_tokens_is_said_to_be_a_lower_bound(runs, call, tmp_path):
    _, out, _ = call(runs / "peer", "--tokens", T, "--out", tmp_path / "seen")
    assert "usage is a lower bound: 2 visits per expert (16 tokens x 8 picks / 64 experts); use at least 80" in out
    assert "≥" in out
    _, out, _ = call(runs / "peer", "--tokens", 80, "--out", tmp_path / "more")
    assert "lower bound" not in out and "≥" not in out


def test_a_dense_run_has_no_routed_layer(runs, call, tmp_path):
    code, out, _ = call(runs / "dense", "--tokens", 100, "--out", tmp_path / "seen")
    assert code == 0 and "no routed layer" in out
    assert "no routed layer" in (tmp_path / "seen" / "inspect.html").read_text()


def copy_of(runs, tmp_path, name="peer"):
    """A copy of a run without its data beside it."""
    folder = tmp_path / "alone" / name
    (folder / "model").mkdir(parents=True)
    for path in ("config.yaml", "model/model.safetensors"):
        (folder / path).write_bytes((runs / name / path).read_bytes())
    return folder


def test_data_from_elsewhere_is_named(runs, call, tmp_path):
    folder = copy_of(runs, tmp_path)
    code, _, err = call(folder)
    assert code == 2 and "give --text, or --data" in err and not (folder / "inspect").exists()
    assert "give --data" in call(folder, "--text", "README.md")[2]
    code, _, err = call(folder, "--data", runs / "data", "--tokens", 100)
    assert code == 0, err
    assert (folder / "inspect" / "inspect.json").is_file()


def wrong(runs, tmp_path):
    """Name of a mistake -> (arguments, what the error says)."""
    unfinished, cut, other = (copy_of(runs, tmp_path / name) for name in ("unfinished", "cut", "other"))
    (unfinished / "model" / "model.safetensors").unlink()
    weights = cut / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (other / "config.yaml").write_text(
        (other / "config.yaml").read_text().replace("num_experts: 64", "num_experts: 81")
    )
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("\n")
    short.write_text("cat")
    comparison = tmp_path / "comparison"
    comparison.mkdir()
    (comparison / "plan.yaml").write_text("{}")
    return {
        "no run": ([tmp_path], "is no run folder"),
        "missing": ([tmp_path / "nowhere"], "no such folder"),
        "unfinished": ([unfinished], "holds no trained model"),
        "cut": ([cut, "--data", runs / "data"], "is damaged"),
        "other": ([other, "--data", runs / "data"], "does not fit"),
        "unfinished comparison": ([comparison], "unfinished comparison"),
        "empty": ([runs / "peer", "--text", empty], "holds no text"),
        "short": ([runs / "peer", "--text", short], "less than one window of 16"),
        "no text": ([runs / "peer", "--text", tmp_path / "no.txt"], "no such file"),
        "few tokens": ([runs / "peer", "--tokens", "15"], "tokens=15 must be at least the run's model.seq_len=16"),
        "no data": ([runs / "peer", "--data", tmp_path], "holds no finished shards"),
    }


MISTAKES = (
    "no run", "missing", "unfinished", "cut", "other", "unfinished comparison", "empty", "short", "no text",
    "few tokens", "no data",
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(runs, call, tmp_path, mistake):
    args, says = wrong(runs, tmp_path)[mistake]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(*args, "--out", tmp_path / "seen")
    assert code == 2, err
    assert not out and says in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_writes_nothing(runs, call, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsemix.inspection.document_losses", interrupted)
    code, _, err = call(runs / "peer", "--out", tmp_path / "seen")
    assert code == 130 and err == "sparsemix: interrupted; no file is half-written; the same command starts anew\n"
    assert not list(tmp_path.iterdir())


def test_a_comparison_is_inspected_by_the_first_seed_of_each_kind(runs, call, tmp_path):
    (runs / "plan.yaml").write_text("{}")
    rows = [
        {"kind": kind, "runs": [{"seed": 1, "folder": "nowhere"}, {"seed": 0, "folder": kind}]}
        for kind in ("dense", "peer")
    ]
    (runs / "result.json").write_text(json.dumps({"rows": rows}))
    try:
        code, out, err = call(runs, "--tokens", 100, "--out", tmp_path / "seen")
    finally:
        (runs / "plan.yaml").unlink()
        (runs / "result.json").unlink()
    assert code == 0, err
    assert [run["run"] for run in json.loads((tmp_path / "seen" / "inspect.json").read_text())["runs"]] == [
        "dense",
        "peer",
    ]
    assert "no routed layer" in out and (tmp_path / "seen" / "peer-load.png").is_file()
