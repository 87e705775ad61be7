"""An exported folder is what Hugging Face's tools open, and its card says what the run says."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from commands import call
from sparsemix import saved, trained
from sparsemix.config import ConfigError, parse
from sparsemix.data.tokenizer import encode_batch
from sparsemix.interop import export as exporting
from sparsemix.interop.card import bits_per_byte
from sparsemix.interop.causal_rules import RULES, causal_rules
from sparsemix.interop.export import export
from sparsemix.layers import Ctx
from sparsemix.model import ModelConfig
from sparsemix.run import CONVENTION
from sparsemix.train import train
from tiny import ATTENTION, BLOCKS, D, T, V, mod, prepared, run_config, unchecked_shapes

LLAMA = {"kind": "block", "mixer": ATTENTION, "ffn": {"kind": "dense", "d_ff": 40}}
MIXTRAL = LLAMA | {
    "ffn": {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 20, "normalize_gates": True, "capacity_factor": 1.5}
}
RUNS = {"nested": "nested", "llama": [LLAMA, LLAMA], "mixtral": [MIXTRAL, MIXTRAL]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with unchecked_shapes():
        data, shards = prepared(folder)
        data = data.replace(fingerprint=shards.manifest["fingerprint"])
        for name, blocks in RUNS.items():
            train(run_config(data, blocks, steps=3, seed=7), folder / name, shards)
    return folder


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_an_exported_run_opens_as_its_own_model_and_generates(runs, tmp_path):
    export(runs / "nested", tmp_path / "out")
    wanted = trained.load(runs / "nested")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(V, (2, T))
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name
    with torch.no_grad():
        # Not to the bit: a product's sums depend on where in memory its operands begin.
        torch.testing.assert_close(logits_of(model, ids), wanted.model(ids, Ctx(causal=True)).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(["the cat sees", "one"], padding=True, return_tensors="pt")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == settings.pad_token_id == model.config.eos_token_id == tokenizer.eos_token_id == 0
    said = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert said.shape == (2, batch["input_ids"].shape[1] + 4)
    # The library reads it too, and exports it again; a run is then no longer known.
    again = saved.read(tmp_path / "out")
    assert again.tokenizer is not None and wanted.tokenizer is not None
    texts = ["the cat sees one red hat. ", "<|endoftext|> written out"]
    assert [list(ids) for ids in encode_batch(again.tokenizer, texts)] == [
        list(ids) for ids in encode_batch(wanted.tokenizer, texts)
    ]
    export(tmp_path / "out", tmp_path / "again")
    assert "not recorded" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("layout", ["llama", "mixtral"])
def test_other_layouts_open_as_transformers_own_classes(layout, runs, tmp_path):
    export(runs / layout, tmp_path / "out", layout)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__module__ == f"transformers.models.{layout}.modeling_{layout}"
    ids = torch.randint(V, (2, T))
    with torch.no_grad():
        wanted = trained.load(runs / layout).model(ids, Ctx(causal=True)).logits
    torch.testing.assert_close(logits_of(model, ids), wanted, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 0
    assert "import sparsemix" not in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_what_the_run_says(runs, tmp_path):
    found = trained.load(runs / "nested")
    assert found.config is not None and found.result is not None
    path = runs / "nested" / "eval.json"
    measured = {"name": "wikitext", "documents": 3, "bits_per_byte": {"value": 2.5, "error": 0.25}}
    row = measured | {"perplexity": {"value": 90.0, "error": None}}
    path.write_text(json.dumps({"corpora": {"wikitext": {"rows": [row]}, "c4": {"not_available": "no file"}}}))
    export(runs / "nested", tmp_path / "out")
    path.unlink()
    card = (tmp_path / "out" / "README.md").read_text()
    head, text = card.split("---\n", 2)[1:]
    data = yaml.safe_load(head)
    assert data["library_name"] == "transformers" and {"sparsemix", "moe", "mod", "peer"} <= set(data["tags"])
    results = data["model-index"][0]["results"]
    assert [r["metrics"][0]["value"] for r in results] == [round(found.result["bpb"], 5), 2.5]
    for told in (
        CONVENTION,
        f"{found.result['bpb']:.4f} bits per byte",
        f"| tokens | {found.result['tokens']:,} |",
        f"| fingerprint of the text | {found.config.data.fingerprint} |",
        "| seed | 7 |",
        "| text | corpus.jsonl |",
        "capacity 0.25, gate sigmoid: in training the best-scored tokens",
        "of which a predictor says so",
        "`blocks.1` processed",
        "| wikitext | 2.5 ± 0.25 | 90 | 3 |",
        f"{found.result['lookahead_bpb'] - found.result['bpb']:+.4f}",
    ):
        assert told in text, told
    assert str(runs) not in card


def test_the_interval_is_that_of_a_ratio_of_sums(tmp_path):
    rng = np.random.default_rng(0)
    num_bytes = rng.integers(20, 400, 300)
    nats = num_bytes * (2 + 0.3 * rng.normal(size=300))
    np.savez(tmp_path / "documents.npz", ids=np.arange(300), nats=nats, bytes=num_bytes)
    found = bits_per_byte(tmp_path / "documents.npz")
    assert found is not None and found.documents == 300 and 1.96 < found.half / found.error < 1.98
    assert found.value == pytest.approx(nats.sum() / np.log(2) / num_bytes.sum())
    drawn = rng.integers(300, size=(4000, 300))
    resampled = nats[drawn].sum(1) / np.log(2) / num_bytes[drawn].sum(1)
    assert found.error == pytest.approx(resampled.std(), rel=0.08)


def config_of(blocks):
    return parse(ModelConfig, {"d_model": D, "vocab_size": V, "seq_len": T, "blocks": blocks})


def test_every_routed_kind_has_its_rule_in_words():
    for kind in RULES:
        blocks = BLOCKS[kind if kind in BLOCKS else "moe"]
        told = causal_rules(config_of(blocks))
        assert told and all("(block" in line for line in told)
    for settings in ({"selector": "strided"}, {"selector": "random"}, {"selector": "token_choice"}, {"capacity": 3}):
        (told,) = causal_rules(config_of([mod(LLAMA, **settings)]))
        assert told.startswith("Mixture of Depths, capacity")


def bad_places(runs, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").write_text("mine")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(runs / "llama" / "config.yaml", unfinished)
    return {"full": full, "unfinished": unfinished, "out": tmp_path / "out", "llama": runs / "llama"}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("llama", "--to", "full"), "is not empty; name a new folder"),
        (("unfinished", "--to", "out"), "holds no trained model; finish the run"),
        (("full", "--to", "out"), "is no model: it has no config.json"),
        (("llama", "--to", "out", "--layout", "mixtrall"), "layout=mixtrall must be one of"),
        (("llama", "--to", "out", "--layout", "mixtral"), "layout=mixtral has no equal of"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(args, told, runs, tmp_path, monkeypatch, capsys):
    places = bad_places(runs, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(monkeypatch, capsys, "export", *[places.get(word, word) for word in args])
    assert code == 2 and not out and len(err.splitlines()) == 1 and told in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_exports_and_an_interruption_leaves_nothing(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    code, out, _ = call(monkeypatch, capsys, "export", runs / "llama", "--to", tmp_path / "empty")
    assert code == 0 and out.strip() == f"exported: {tmp_path / 'empty'}"
    assert {"config.json", "model.safetensors", "README.md", "tokenizer_config.json"} <= {
        path.name for path in (tmp_path / "empty").iterdir()
    }

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "model_card", interrupt)
    code, _, err = call(monkeypatch, capsys, "export", runs / "llama", "--to", tmp_path / "other")
    assert code == 130 and "nothing is half-written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    with pytest.raises(ConfigError, match="is not empty"):
        export(runs / "llama", tmp_path / "empty")
