"""Training goes on from a saved model: its weights, its tokenizer, and the same run again when it is cut."""

import json

import pytest
import torch
from dense_run import dense_run
from safetensors.torch import load_file

from commands import call
from sparsemix import checkpoint, saved, train
from sparsemix.config import ConfigError
from sparsemix.evaluate.perplexity import document_losses
from sparsemix.interop.conversion import convert_folder
from sparsemix.interop.plan import ConvertConfig
from sparsemix.run import Run
from sparsemix.settings import InitConfig
from tiny import changed, run_config, unchecked_shapes

FALLS = {"capacity": 0.25, "every": 2, "anneal_steps": 12}


@pytest.fixture(autouse=True)
def unchecked():
    with unchecked_shapes():
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def corpus(dense):
    return dense.data, dense.shards


@pytest.fixture(scope="module")
def source(dense, tmp_path_factory):
    """A converted model: experts in one block, Mixture-of-Depths around it."""
    to = tmp_path_factory.mktemp("converted") / "source"
    ffn = {"kind": "moe", "num_experts": 4}
    settings = ConvertConfig(ffn=ffn, layers=(1,), mod=FALLS)
    convert_folder(str(dense.folder), to, settings, dense.text, tokens=200)
    return to


def going_on(corpus, source, steps=16, **settings):
    """Settings of a run that starts with the source's weights."""
    model = saved.read_settings(source)
    data = corpus[0].replace(tokenizer=str(source / "tokenizer.json"))
    config = run_config(data, [block.model_dump() for block in model.blocks], steps=steps, lr=3e-3, **settings)
    init = InitConfig(folder=str(source), fingerprint=saved.fingerprint(source))
    return config.replace(init=init)


def lines(folder):
    return list(Run(folder).metrics())


def test_the_first_loss_is_the_sources_and_training_lowers_it_while_the_capacity_falls(corpus, source, tmp_path):
    _, shards = corpus
    config = going_on(corpus, source, steps=40)
    said = lines(train.train(config, tmp_path / "on", shards).folder)
    batch = next(train.training_batches(config, shards, checkpoint.TrainState(), torch.device("cpu")))
    kept = document_losses(saved.read(source).model, [batch])
    assert said[0]["loss"] == pytest.approx(kept.total / kept.tokens, rel=1e-5)
    first, last = (sum(line["loss"] for line in part) / 5 for part in (said[:5], said[-5:]))
    assert last < first
    extra = [line.get("blocks.1.extra_flops", 0.0) for line in said]
    assert extra[0] > 0 == extra[-1] and extra == sorted(extra, reverse=True) and len(set(extra)) == 5
    # The control: drawn from the seed, the model starts elsewhere.
    fresh = lines(train.train(config.replace(init=None), tmp_path / "fresh", shards).folder)
    assert fresh[0]["loss"] > said[0]["loss"] + 1


def test_after_training_the_predictor_rules(corpus, source, tmp_path):
    _, shards = corpus
    result = train.train(going_on(corpus, source, steps=60), tmp_path / "on", shards).result
    assert result is not None
    before = document_losses(saved.read(source).model, shards.eval_batches("test", 4, 16, 150))
    routed = result["routing"]["blocks.1"]["routed_rate"] if "blocks.1" in result["routing"] else None
    assert before.passes is not None and before.passes[0] == 0  # before training every token passes
    model = saved.read(tmp_path / "on" / "model").model
    after = document_losses(model, shards.eval_batches("test", 4, 16, 150))
    assert after.passes is not None and after.passes[0] > 0, routed


def test_a_run_that_was_cut_goes_on_bit_for_bit_and_without_its_source(corpus, source, tmp_path, monkeypatch):
    _, shards = corpus
    config = going_on(corpus, source, steps=6)
    whole = train.train(config, tmp_path / "whole", shards).folder

    def cut(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "cut", shards, cut)
    monkeypatch.setattr(InitConfig, "check", lambda _: pytest.fail("a run that goes on reads no source"))
    train.train(config, tmp_path / "cut", shards)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (whole, tmp_path / "cut")]
    assert changed(*weights) == []


def test_other_weights_than_the_named_ones_are_refused_and_nothing_is_written(corpus, source, tmp_path):
    _, shards = corpus
    config = going_on(corpus, source)
    assert config.init is not None
    for init, says in (
        (config.init.replace(fingerprint="0"), "init.fingerprint=0: the weights in .* are now "),
        (InitConfig(folder=str(tmp_path / "none")), "holds no trained model"),
    ):
        with pytest.raises(ConfigError, match=says):
            train.train(config.replace(init=init), tmp_path / "run", shards)
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_model_tokenizer_and_weights_from_the_folder(monkeypatch, capsys, source, dense, tmp_path):
    budget = 1.5 * 3 * saved.read_settings(source).cost().flops * 4
    settings = [f"train.budget_flops={budget}", "train.batch_tokens=64", "train.evals=1", "train.eval_tokens=100"]
    settings += ["train.test_tokens=100", "train.dtype=float32"]
    out = tmp_path / "run"
    words = ["train", "--init-from", source, *settings, "--text", *dense.text, "--out", out]
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 0 and "model.blocks.1.anneal_steps=12: more than the run has steps" in err
    kept = Run(out).settings
    assert kept["init"] == {"folder": str(source), "fingerprint": saved.fingerprint(source)}
    assert kept["data"]["tokenizer"] == str(source / "tokenizer.json")
    assert kept["model"] == saved.read_settings(source).model_dump(mode="json")
    tokenizers = [json.loads((folder / "tokenizer.json").read_text()) for folder in (source, out / "model")]
    assert tokenizers[0]["model"] == tokenizers[1]["model"]
    assert call(monkeypatch, capsys, *words)[0] == 0  # finished: it returns at once
    # A run's folder is a source as well, and its recipe may be named beside it.
    again = ["train", "tiny", "--init-from", out, *settings, "--text", *dense.text, "--out", tmp_path / "again"]
    assert call(monkeypatch, capsys, *again)[0] == 0
    assert Run(tmp_path / "again").settings["init"]["folder"] == str(out / "model")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name a recipe"),
        (["--init-from", "none"], "none: no such folder; name a run's folder"),
        (["--init-from", "SOURCE"], "train.budget_flops is missing"),
        (["--init-from", "SOURCE", "train.budget_flops=1e12", "model.d_model=32"], "does not fit the settings"),
        (["--init-from", "BARE"], "has no tokenizer.json"),
    ],
    ids=str,
)
def test_a_source_that_cannot_be_is_one_line(monkeypatch, capsys, source, dense, tmp_path, words, says):
    saved.write(saved.read(source).model, tmp_path / "bare")
    places = {"SOURCE": source, "BARE": tmp_path / "bare"}
    words = [places.get(word, word) for word in words]
    code, _, err = call(monkeypatch, capsys, "train", *words, "--text", *dense.text, "--out", tmp_path / "run")
    assert code == 2 and says in err.splitlines()[-1] and not (tmp_path / "run").exists()
