"""Decoders that transformers saved, converted: the logits are those of transformers' own class."""

import json

import pytest
import torch
import transformers
from test_read_decoder import SIZES, V, saved, theirs

from commands import call
from sparsemix import trained
from sparsemix.data.tokenizer import train_tokenizer
from sparsemix.interop.conversion import convert_folder
from sparsemix.interop.plan import ConvertConfig
from sparsemix.run import Run

pytestmark = pytest.mark.usefixtures("unchecked")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
# One kind that copies feed-forwards without biases, and one that keeps them.
FFNS = {"moe": {"kind": "moe", "num_experts": 6, "d_ff": 9, "top_k": 3}, "peer": {"kind": "peer", "num_experts": 64}}


@pytest.mark.parametrize("ffn", ["moe", "peer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_starts_with_its_own_logits(name, ffn, tmp_path):
    reference = saved(name, tmp_path / "source")
    settings = ConvertConfig(ffn=FFNS[ffn] if name != "gpt2" else {"kind": ffn}, layers="every-2", mod={"every": 2})
    said = convert_folder(str(tmp_path / "source"), tmp_path / "to", settings, tokens=60)
    copies = ffn == "moe" and name != "gpt2"
    assert [part["how"] for part in said["feed_forwards"]] == ["copied" if copies else "kept"]
    assert said["equal_to_rounding"] and said["text"] is None
    model, tokens = trained.load(tmp_path / "to").model, torch.randint(V, (2, 19))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits.float(), rtol=1.3e-6, atol=1e-5)


def test_a_llama_with_its_tokenizer_is_converted_and_trained_on(monkeypatch, capsys, tmp_path):
    texts = [f"the {a} {b} sees one {c} hat.\n\n" * 3 for a in ("cat", "dog") for b in ("old", "big") for c in "xyzuvw"]
    tokenizer = train_tokenizer(texts, 300)
    monkeypatch.setitem(SIZES, "vocab_size", 300)
    theirs("llama").save_pretrained(tmp_path / "source")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("".join(texts))
    words = ["--to", tmp_path / "to", "--ffn", "moe", "--layers", "middle", "--text", tmp_path / "text.txt"]
    code, out, _ = call(monkeypatch, capsys, "convert", tmp_path / "source", *words)
    assert code == 0 and "equal to rounding" in out
    said = json.loads((tmp_path / "to" / "receipt.json").read_text())
    assert said["perplexity_before"] == pytest.approx(said["perplexity_after"], rel=1e-6)
    assert (tmp_path / "to" / "tokenizer_config.json").is_file()
    settings = ["model.seq_len=16", "train.budget_flops=7e7", "train.batch_tokens=64", "train.lr=3e-3"]
    small = ["train.evals=1", "train.eval_tokens=60", "train.test_tokens=60", "train.dtype=float32"]
    words = ["--init-from", tmp_path / "to", *settings, *small, "--text", tmp_path / "text.txt"]
    assert call(monkeypatch, capsys, "train", *words, "--out", tmp_path / "run")[0] == 0
    losses = [line["loss"] for line in Run(tmp_path / "run").metrics()]
    assert len(losses) >= 8 and losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "opt"}, "model_type=opt is none of the decoders read here"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantised weights are not read"),
        (None, "is a pickle, which may run any code and is not opened"),
    ],
    ids=["architecture", "quantised", "pickle"],
)
def test_a_decoder_that_is_not_read_is_one_line_and_leaves_nothing(monkeypatch, capsys, change, says, tmp_path):
    source = tmp_path / "source"
    theirs("llama").save_pretrained(source)
    if change is None:
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
    else:
        raw = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(raw | change))
    code, out, err = call(monkeypatch, capsys, "convert", source, "--to", tmp_path / "to", "--ffn", "moe")
    assert code == 2 and says in err.splitlines()[-1] and out == ""
    assert list(tmp_path.iterdir()) == [source]
