"""`sparsemix convert` as a user meets it: a folder and its receipt, or one line and nothing."""

import json

import pytest
import torch
from dense_run import dense_run

from commands import call
from sparsemix import saved, trained
from sparsemix.interop.conversion import convert_folder
from sparsemix.interop.plan import ConvertConfig
from sparsemix.interop.receipt import lines
from sparsemix.layers import Ctx
from tiny import V


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(dense):
    return dense.folder


@pytest.fixture
def text(dense):
    return dense.text


def logits(folder):
    tokens = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return trained.load(folder).model(tokens, Ctx(causal=True)).logits


def test_a_run_becomes_a_saved_model_with_a_tokenizer_and_a_receipt(monkeypatch, capsys, run, text, tmp_path):
    to = tmp_path / "deeper" / "converted"
    options = ["--ffn", "moe", "--ffn-set", "num_experts=4", "--layers", "middle", "--mod", "capacity=0.25,every=2"]
    code, out, err = call(monkeypatch, capsys, "convert", run, "--to", to, *options, "--text", *text)
    assert code == 0 and "warning" not in err
    assert sorted(path.name for path in to.iterdir()) == [
        "README.md",
        "checksums.json",
        "config.json",
        "model.safetensors",
        "receipt.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(to.parent.iterdir()) == [to]
    said = json.loads((to / "receipt.json").read_text())
    assert said["equal_to_rounding"] and said["max_abs_logit_difference"] < 1e-5
    assert said["perplexity_after"] == pytest.approx(said["perplexity_before"], rel=1e-6)
    assert said["perplexity_before"] < 30 < V  # it was trained on this text
    assert said["settings"]["ffn"] == {"num_experts": 4, "kind": "moe"}
    assert [line for line in out.splitlines() if line.startswith("read: 1 file, ")]
    assert set(lines(said)) <= set(out.splitlines())
    assert all(f"- {line}" in (to / "README.md").read_text() for line in lines(said))
    torch.testing.assert_close(logits(to), logits(run), rtol=0, atol=1e-5)


def test_the_receipt_counts_what_the_settings_cost(run, text, tmp_path):
    said = convert_folder(str(run), tmp_path / "to", ConvertConfig(ffn={"kind": "peer"}), text, tokens=64)
    old, new = trained.load(run).model, saved.read(tmp_path / "to").model
    for model, counted in ((old, said["before"]), (new, said["after"])):
        cost = model.config.cost()
        assert counted["params"] == cost.params == sum(p.numel() for p in model.parameters())
        assert counted["flops_per_token"] == cost.flops / model.config.seq_len
    parts = said["parameters"]
    assert sum(parts.values()) == said["after"]["params"] and parts["carried"] == said["before"]["params"]
    assert said["tokens"] == 64 and said["feed_forwards"][0]["how"] == "kept"


def test_a_conversion_that_changes_the_logits_warns_and_says_why(monkeypatch, capsys, run, text, tmp_path):
    words = ["convert", run, "--ffn", "moe", "--text", *text, "--tokens", 300]
    for i, (extra, why) in enumerate(
        [
            (["--init", "fresh"], "the feed-forward of block 0, 1 is drawn anew"),
            (["--noise", "0.2"], "noise of 0.2"),
            (["--ffn-set", "normalize_gates=false"], "gates do not sum to 1"),
        ]
    ):
        code, out, err = call(monkeypatch, capsys, *words, "--to", tmp_path / str(i), *extra)
        assert code == 0 and "different, max |difference|" in out
        assert "warning: the converted model differs" in err and why in err
        assert json.loads((tmp_path / str(i) / "receipt.json").read_text())["kl_nats"] > 1e-6


def test_layers_with_running_statistics_are_ready_when_converted(run, text, tmp_path):
    for kind in ("expert_choice", "peer", "pkm"):
        convert_folder(str(run), tmp_path / kind, ConvertConfig(ffn={"kind": kind}, init="fresh"), text, tokens=400)
        assert logits(tmp_path / kind).isfinite().all()


def test_with_nothing_to_change_the_model_is_the_same(run, text, tmp_path):
    said = convert_folder(str(run), tmp_path / "same", ConvertConfig(), text, tokens=100)
    assert said["max_abs_logit_difference"] == said["kl_nats"] == 0
    assert torch.equal(logits(tmp_path / "same"), logits(run))


def test_a_model_without_a_tokenizer_is_compared_on_random_tokens(run, tmp_path):
    saved.write(trained.load(run).model, tmp_path / "bare")
    said = convert_folder(str(tmp_path / "bare"), tmp_path / "to", ConvertConfig(ffn={"kind": "moe"}), tokens=100)
    assert said["equal_to_rounding"] and said["perplexity_before"] is said["text"] is None
    assert "random tokens: the source has no tokenizer" in lines(said)[1]


def spoiled(run, tmp_path, name):
    """A folder that holds no model that can be read."""
    folder = tmp_path / name
    saved.write(trained.load(run).model, folder)
    if name == "empty":
        for path in folder.iterdir():
            path.unlink()
    if name == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    if name == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if name == "no_json":
        (folder / "config.json").write_text("{")
        (folder / "checksums.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "is no model: it has no config.json"),
        ("cut", "is damaged"),
        ("pickled", "model.safetensors is missing"),
        ("no_json", "is not valid JSON"),
    ],
)
def test_a_folder_that_holds_no_model_is_one_line_and_leaves_nothing(monkeypatch, capsys, run, tmp_path, name, says):
    folder = spoiled(run, tmp_path, name)
    code, out, err = call(monkeypatch, capsys, "convert", folder, "--to", tmp_path / "to", "--ffn", "moe")
    assert code == 2 and says in err.splitlines()[-1] and out == ""
    assert not (tmp_path / "to").exists() and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ffn", "mo"], "ffn=mo is none of dense, moe"),
        (["--ffn-set", "d_ff=3"], "ffn-set=d_ff=3 needs --ffn"),
        (["--ffn", "moe", "--ffn-set", "d_ff=3"], "d_ff=3 must divide"),
        (["--ffn", "moe", "--ffn-set", "d_ff"], "must look like setting.name=value"),
        (["--ffn", "moe", "--layers", "7"], "from 0 to 1"),
        (["--mod", "capacity"], "must look like setting.name=value"),
        (["--mod", "capacity=0.5,everi=2"], "everi=2 is no setting here"),
        (["--ffn", "moe", "--tokens", "0"], "tokens=0 must be at least 1"),
        (["--ffn", "moe", "--text", "missing.txt"], "missing.txt: no such file"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line_and_leave_nothing(monkeypatch, capsys, run, tmp_path, options, says):
    code, out, err = call(monkeypatch, capsys, "convert", run, "--to", tmp_path / "to", *options)
    assert code == 2 and says in err.splitlines()[-1] and out == "" and list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(monkeypatch, capsys, run, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    for to, says in ((tmp_path, "is not empty"), (tmp_path / "note.txt", "is no folder")):
        code, _, err = call(monkeypatch, capsys, "convert", run, "--to", to, "--ffn", "moe")
        assert code == 2 and says in err
    code, _, err = call(monkeypatch, capsys, "convert", tmp_path / "none", "--to", tmp_path / "to", "--ffn", "moe")
    assert code == 2 and "no such folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_failure_while_writing_leaves_nothing(monkeypatch, run, text, tmp_path):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsemix.interop.conversion.lines", fail)
    with pytest.raises(OSError, match="No space"):
        convert_folder(str(run), tmp_path / "to", ConvertConfig(ffn={"kind": "moe"}), text, tokens=100)
    assert list(tmp_path.iterdir()) == []
