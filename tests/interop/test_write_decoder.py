"""A model written in another class's layout has the same logits there, and generates the same tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sparsemix.api import build_model
from sparsemix.config import ConfigError
from sparsemix.data.tokenizer import EOT, train_tokenizer
from sparsemix.interop.families import families_of, read_decoder, write_decoder
from sparsemix.layers import Ctx

pytestmark = pytest.mark.usefixtures("unchecked")

V, T = 37, 19
ATTENTION = {"kind": "attention", "num_heads": 5, "num_kv_heads": 1, "rope_theta": 100.0}
DENSE = {"kind": "dense", "d_ff": 27}
MOE = {"kind": "moe", "num_experts": 6, "top_k": 2, "d_ff": 13, "capacity_factor": 0.5}
NORMED = MOE | {"normalize_gates": True}
HEAD, FULL = {"qk_norm": {"over": "head", "eps": 1e-3}}, {"qk_norm": {"over": "full", "eps": 1e-3}}
LLAMA3 = {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_seq_len": 40}}
UNTIED = {"tie_embeddings": False}


def raw(mixer, *ffns, **more):
    blocks = [{"kind": "block", "mixer": ATTENTION | mixer, "ffn": ffn} for ffn in ffns]
    return {
        "d_model": 20,
        "vocab_size": V,
        "seq_len": 64,
        "norm": {"kind": "rms", "eps": 1e-3},
        "blocks": blocks,
        **more,
    }


BIASED = DENSE | {"bias": True, "activation": "geglu"}
# Every model fits exactly the families it is listed with.
CASES = {
    "llama": (["llama", "mistral"], raw({}, DENSE, DENSE)),
    "llama3": (
        ["llama"],
        raw({"bias": "all", **LLAMA3}, BIASED, BIASED, **UNTIED),
    ),
    "mistral": (["mistral"], raw({"window": 5, "d_head": 6}, DENSE, DENSE, **UNTIED)),
    "qwen2": (["qwen2"], raw({"bias": "qkv"}, DENSE, DENSE)),
    "qwen3": (["qwen3"], raw({**HEAD, "d_head": 6, "bias": "all"}, DENSE, DENSE)),
    "mixtral": (["mixtral"], raw({"d_head": 6, "window": 4}, NORMED, NORMED, **UNTIED)),
    "mixtral_tied": (["mixtral"], raw({"rope_scaling": {"kind": "linear", "factor": 2.0}}, NORMED, NORMED)),
    "olmoe": (["olmoe"], raw(FULL, MOE, MOE, **UNTIED)),
    "olmoe_normalised": (["olmoe"], raw({**FULL, "bias": "all"}, NORMED, NORMED)),
    "qwen3_moe": (["qwen3_moe"], raw({**HEAD, "d_head": 6}, MOE, MOE, **UNTIED)),
    "qwen3_moe_normalised": (["qwen3_moe"], raw({**HEAD, "window": 4}, NORMED, NORMED)),
    "qwen3_moe_mixed": (["qwen3_moe"], raw(HEAD, DENSE, MOE, DENSE, MOE | {"bias_rate": 0.1, "z_weight": 0.1})),
}
PAIRS = [(name, family) for name, (families, _) in CASES.items() for family in families]


def built(settings):
    """A model with every parameter away from its special values."""
    model = build_model(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def theirs(folder):
    # Its experts' default product takes neither fp64 nor rows of other than 16 bytes' multiples.
    eager = {"experts_implementation": "eager", "output_loading_info": True}
    model, told = AutoModelForCausalLM.from_pretrained(folder, **eager)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_a_model_fits_the_families_that_compute_it_and_no_other(name):
    families, settings = CASES[name]
    assert families_of(built(settings)) == families


@pytest.mark.parametrize(("name", "family"), PAIRS, ids=[f"{name}-{family}" for name, family in PAIRS])
def test_transformers_own_class_has_the_same_logits_and_generates_the_same(name, family, tmp_path):
    model, tokens = built(CASES[name][1]), torch.randint(V, (2, T))
    write_decoder(model, tmp_path, family)
    other = theirs(tmp_path)
    assert other.config.model_type == family
    with torch.no_grad():
        wanted = model.double()(tokens, Ctx(causal=True)).logits
        # Norms and rotary angles are fp32 there in any dtype.
        torch.testing.assert_close(other.double()(tokens).logits, wanted, rtol=1.3e-6, atol=1e-5)
        assert wanted.std() > 0.1
        start = {"input_ids": tokens[:, :5], "attention_mask": torch.ones(2, 5)}
        made = other.float().generate(**start, max_new_tokens=8, do_sample=False)
        grown = tokens[:, :5]
        for _ in range(8):
            grown = torch.cat([grown, model(grown, Ctx(causal=True)).logits[:, -1:].argmax(-1)], 1)
    assert made.tolist() == grown.tolist()


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_what_was_written_is_read_back_bit_for_bit(name, tmp_path):
    (family, *_), settings = CASES[name]
    model = built(settings)
    write_decoder(model, tmp_path, family)
    decoder = read_decoder(tmp_path)
    assert decoder.config == model.config
    assert all(torch.equal(tensor, decoder.weights[key]) for key, tensor in model.state_dict().items())


def test_experts_are_packed_under_the_names_that_others_look_for(tmp_path):
    model = built(CASES["mixtral"][1])
    write_decoder(model, tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    bank = model.blocks[1].ffn.experts
    assert torch.equal(tensors["model.layers.1.mlp.experts.gate_up_proj"], bank.gate_up)
    assert torch.equal(tensors["model.layers.1.mlp.experts.down_proj"], bank.down)
    assert torch.equal(tensors["model.layers.1.mlp.gate.weight"], model.blocks[1].ffn.router.weight)
    assert "lm_head.weight" in tensors
    write_decoder(built(CASES["mixtral_tied"][1]), tmp_path, "mixtral")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_experts_of_usual_widths_run_by_default_as_here(tmp_path):
    model, tokens = built(raw({}, NORMED | {"d_ff": 16}, NORMED | {"d_ff": 16})), torch.randint(V, (2, T))
    write_decoder(model, tmp_path, "mixtral")
    with torch.no_grad():
        got, wanted = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits
    torch.testing.assert_close(got, wanted)


def test_the_dtype_is_kept(tmp_path):
    write_decoder(built(CASES["olmoe"][1]).bfloat16(), tmp_path, "olmoe")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert theirs(tmp_path).dtype == torch.bfloat16


def test_the_tokenizer_and_the_end_of_text_come_along(tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat", "a dog"] * 3, 270)
    model = built(CASES["olmoe"][1] | {"vocab_size": 270})
    write_decoder(model, tmp_path, "olmoe", tokenizer)
    other = AutoTokenizer.from_pretrained(tmp_path)
    text = "the dog sat\n on a  cat"
    assert other(text)["input_ids"] == tokenizer.encode(text).ids
    assert other.decode(other(text)["input_ids"]) == text
    assert other.eos_token == EOT and other.eos_token_id == 0
    assert theirs(tmp_path).generation_config.eos_token_id == 0
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 0
    assert read_tokenizer_ids(tmp_path, text) == tokenizer.encode(text).ids
    with pytest.raises(ConfigError, match=r"the tokenizer does not match the model: \d+ ids, vocab_size=37; give the"):
        write_decoder(built(CASES["olmoe"][1]), tmp_path, "olmoe", tokenizer)


def read_tokenizer_ids(folder, text):
    from sparsemix.data.tokenizer import load_tokenizer

    return load_tokenizer(str(folder)).encode(text).ids


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model, folder = built(CASES["olmoe"][1]), tmp_path / "out"
    write_decoder(model, folder, "olmoe")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        write_decoder(built(CASES["mixtral"][1]), folder, "mixtral")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


MOD = {"kind": "mod", "inner": {"kind": "block", "mixer": ATTENTION, "ffn": DENSE}}
PEER = {"kind": "peer", "num_experts": 16, "num_heads": 2, "top_k": 3, "d_key": 4}
OWN = "; only the layout of this library holds it"


@pytest.mark.parametrize(
    ("family", "settings", "wanted"),
    [
        ("mixtrel", raw({}, NORMED), "layout=mixtrel must be one of llama, mistral, qwen2, qwen3, mixtral"),
        ("llama", raw({}, DENSE) | {"blocks": [MOD]}, "layout=llama has no equal of blocks.0.kind=mod" + OWN),
        ("mixtral", raw({}, NORMED, PEER), "has no equal of blocks.1.ffn.kind=peer" + OWN),
        ("mixtral", raw({}, NORMED | {"shared_d_ff": 4}), "has no equal of blocks.0.ffn.shared_d_ff=4" + OWN),
        ("mixtral", raw({}, MOE), "no equal of blocks.0.ffn.normalize_gates=False" + OWN),
        ("mixtral", raw(FULL, NORMED), "no equal of blocks.0.mixer.qk_norm=full; what fits is olmoe"),
        (
            "mixtral",
            raw({}, DENSE),
            "no equal of blocks.0.ffn.kind=dense; a model without a moe; what fits is llama",
        ),
        ("qwen3_moe", raw(HEAD, DENSE), "no equal of a model without a moe; what fits is qwen3"),
        ("mixtral", raw({}, NORMED, NORMED | {"top_k": 1}), "no equal of ffn.top_k that differs between blocks" + OWN),
        ("mixtral", raw({}, NORMED | {"activation": "gelu"}), "no equal of blocks.0.ffn.activation=gelu" + OWN),
        ("llama", raw({"window": 3}, DENSE), "no equal of window=3; what fits is mistral"),
        ("llama", raw({"precision": "ternary"}, DENSE), "no equal of blocks.0.mixer.precision=ternary" + OWN),
        ("llama", raw({"rope_theta": None}, DENSE), "no equal of blocks.0.mixer.rope_theta=null" + OWN),
        ("llama", raw({"bias": "qkv"}, DENSE), "no equal of blocks.0.mixer.bias=qkv; what fits is qwen2"),
        ("olmoe", raw({**FULL, "d_head": 6}, MOE), "no equal of blocks.0.mixer.d_head=6" + OWN),
        ("llama", raw({}, DENSE, learned_positions=64), "no equal of learned_positions=64" + OWN),
        ("llama", raw({}, DENSE, norm="layer"), "no equal of norm=layer" + OWN),
        ("qwen3", raw({"qk_norm": "head"}, DENSE), "no equal of norms of several eps (1e-06, 0.001)" + OWN),
    ],
)
def test_what_has_no_equal_is_named_with_what_can_hold_it(family, settings, wanted, tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_decoder(built(settings), tmp_path / "out", family)
    assert wanted in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bias_that_has_moved_the_picks_is_refused_and_one_that_has_not_is_not(tmp_path):
    model = built(raw({}, NORMED | {"bias_rate": 0.1}))
    model.blocks[0].ffn.bias.fill_(0.3)
    write_decoder(model, tmp_path / "even", "mixtral")
    model.blocks[0].ffn.bias[2] = 0.5
    with pytest.raises(ConfigError, match=r"blocks\.0\.ffn\.bias_rate=0\.1 has moved what picks the experts; only"):
        write_decoder(model, tmp_path / "moved", "mixtral")


def test_windows_of_some_layers_fit_where_each_layer_has_its_own(tmp_path):
    settings = raw({**HEAD}, DENSE, DENSE)
    settings["blocks"][1]["mixer"] = settings["blocks"][1]["mixer"] | {"window": 4}
    model, tokens = built(settings), torch.randint(V, (2, T))
    assert families_of(model) == ["qwen3"]
    write_decoder(model, tmp_path, "qwen3")
    with torch.no_grad():
        got, wanted = theirs(tmp_path).double()(tokens).logits, model.double()(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1.3e-6, atol=1e-5)
    assert read_decoder(tmp_path).config.blocks == model.config.blocks
