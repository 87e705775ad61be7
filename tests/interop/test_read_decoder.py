"""A decoder that transformers saved has the same logits here, and nothing of it is left out."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from sparsemix.config import ConfigError, parse
from sparsemix.data.tokenizer import train_tokenizer
from sparsemix.interop.families import read_config, read_decoder
from sparsemix.layers import Cache, Ctx
from sparsemix.model import ModelConfig

pytestmark = pytest.mark.usefixtures("unchecked")

V, T = 37, 19
SIZES = {
    "vocab_size": V,
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}
GPT2 = {"vocab_size": V, "n_embd": 20, "n_head": 5, "n_layer": 3, "n_positions": 23, "bos_token_id": None}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **more}}


CASES = {
    "llama": ("Llama", SIZES),
    "llama_all_heads": ("Llama", SIZES | {"num_key_value_heads": None, "tie_word_embeddings": True}),
    "llama3": ("Llama", SIZES | rope("llama3", **LLAMA3)),
    "llama_linear": ("Llama", SIZES | rope("linear", factor=2.5)),
    "llama_biases": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama_wide": ("Llama", SIZES | {"head_dim": 6}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 5, "head_dim": 6}),
    "mistral_all": ("Mistral", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", SIZES | QWEN_WINDOW),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 6, "tie_word_embeddings": True}),
    "qwen3_bias": ("Qwen3", SIZES | {"head_dim": 4, "attention_bias": True} | QWEN_WINDOW),
    "gpt2": ("GPT2", GPT2),
    "gpt2_inner": ("GPT2", GPT2 | {"n_inner": 11, "activation_function": "gelu", "tie_word_embeddings": False}),
}
SPELLINGS = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}


def theirs(name, seed=0):
    """A model of transformers with every parameter away from its special values."""
    family, settings = CASES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, SPELLINGS.get(family, f"{family}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ours(folder):
    decoder = read_decoder(folder)
    model = decoder.config.build().double().eval()
    model.load_state_dict(decoder.weights, strict=True)
    return model


def saved(name, folder):
    model = theirs(name)
    model.save_pretrained(folder)
    return model.double()


class ExactTurns(nn.Module):
    """Cosines and sines of rotary positions in fp64."""

    def __init__(self, config):
        super().__init__()
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        base = torch.tensor(config.rope_parameters["rope_theta"], dtype=torch.float64)
        self.speed = 1 / base ** (torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)

    def forward(self, x, position_ids):
        angle = torch.cat([position_ids[..., None] * self.speed] * 2, -1)
        return angle.cos(), angle.sin()


def exact(model):
    """The model in fp64 throughout: of transformers' own, norms and rotary angles are fp32 whatever the weights are."""
    if model.config.model_type == "gpt2":
        return model
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    assert model.config.rope_parameters["rope_type"] == "default"
    model.model.rotary_emb = ExactTurns(model.config)
    return model


def assert_equal(mine, wanted):
    torch.testing.assert_close(mine, wanted, rtol=1.3e-6, atol=1e-5)
    assert wanted.std() > 0.1, "logits that are all alike prove nothing"


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_transformers(name, tmp_path):
    reference, tokens = saved(name, tmp_path), torch.randint(V, (2, T))
    model = ours(tmp_path)
    with torch.no_grad():
        mine = model(tokens).logits
        assert_equal(mine, reference(tokens).logits)
        if name not in ("llama3", "llama_linear"):
            torch.testing.assert_close(mine, exact(reference)(tokens).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3_bias", "gpt2"])
def test_decoding_with_a_cache_is_that_of_transformers(name, tmp_path):
    reference, tokens = saved(name, tmp_path), torch.randint(V, (2, T))
    model, cache = ours(tmp_path), Cache(2)
    with torch.no_grad():
        parts = [model(chunk, Ctx(causal=True, cache=cache)).logits for chunk in tokens.split([7, *[1] * 12], dim=1)]
        assert_equal(torch.cat(parts, 1), reference(tokens).logits)


def test_settings_read_are_the_settings_that_yaml_keeps(tmp_path):
    saved("qwen3_bias", tmp_path)
    config = read_decoder(tmp_path).config
    assert parse(ModelConfig, config.model_dump(mode="json")) == config
    mixers = [block.mixer for block in config.blocks]
    assert [mixer.window for mixer in mixers] == [None, 4, 4]
    assert (mixers[0].d_head, mixers[0].num_kv_heads, mixers[0].bias, str(mixers[0].qk_norm.over)) == (
        *(None, 1, "all"),
        "head",
    )


ROPE_32 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# config.json as released, in the spelling of its time, with settings that transformers' classes do not read.
RELEASED = {
    "gpt2": (
        {"model_type": "gpt2", "n_ctx": 1024, "task_specific_params": {"text-generation": {"do_sample": True}}},
        124_439_808,
    ),
    "llama_3.2_1b": (
        {
            **{"model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192},
            **{"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
            **{"max_position_embeddings": 131_072, "rope_theta": 500_000.0, "rope_scaling": ROPE_32},
            **{"tie_word_embeddings": True, "eos_token_id": [128_001, 128_008], "torch_dtype": "bfloat16"},
        },
        1_235_814_400,
    ),
    "mistral_7b": (
        {
            **{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096, "vocab_size": 32_000},
            **{"max_position_embeddings": 32_768, "rope_theta": 10_000.0, "transformers_version": "4.34.0.dev0"},
        },
        7_241_732_096,
    ),
    "qwen2.5_0.5b": (
        {
            **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
            **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "rope_theta": 1e6},
            **{"use_sliding_window": False, "sliding_window": 32_768, "max_window_layers": 24},
            **{"max_position_embeddings": 32_768, "tie_word_embeddings": True, "use_mrope": False},
        },
        494_032_768,
    ),
    "qwen3_0.6b": (
        {
            **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936},
            **{"max_position_embeddings": 40_960, "rope_theta": 1e6, "rope_scaling": None, "sliding_window": None},
            **{"use_sliding_window": False, "max_window_layers": 28, "tie_word_embeddings": True},
        },
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings_give_the_published_number_of_parameters(name, tmp_path):
    raw, params = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    assert config.cost().params == params
    windows = {block.mixer.window for block in config.blocks}
    assert windows == ({4096} if name == "mistral_7b" else {None})


def test_shards_are_read_together(tmp_path):
    model, tokens = theirs("llama"), torch.randint(V, (2, T))
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert_equal(ours(tmp_path)(tokens).logits, model.double()(tokens).logits)
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    assert_refused(tmp_path, "model-00001-of-", "is missing; copy the model whole")


def test_the_tokenizer_comes_along_and_one_that_is_too_large_is_refused(tmp_path):
    saved("llama", tmp_path)
    assert read_decoder(tmp_path).tokenizer is None
    large = train_tokenizer(["the cat sat on the mat"] * 3, 300)
    (tmp_path / "tokenizer.json").write_text(large.to_str())
    assert_refused(tmp_path, "does not match the model", "vocab_size=37")


def test_low_precision_weights_keep_their_dtype_until_they_are_loaded(tmp_path):
    theirs("llama").bfloat16().save_pretrained(tmp_path)
    weights = read_decoder(tmp_path).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert ours(tmp_path).embed.weight.dtype == torch.float64


def test_gpt2_without_its_prefix_and_with_its_mask_is_the_same_model(tmp_path):
    model, tokens = saved("gpt2", tmp_path), torch.randint(V, (2, T))
    old = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 23, 23).tril() for i in range(3)}
    save_file(old, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_equal(ours(tmp_path)(tokens).logits, model(tokens).logits)


def assert_refused(folder, *wanted):
    before = sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []
    with pytest.raises(ConfigError) as caught:
        read_decoder(folder)
    assert all(part in str(caught.value) for part in wanted), str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert (sorted(path.name for path in Path(folder).iterdir()) if before else []) == before


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        ("llama", {"model_type": "lama"}, "gpt2, llama, mistral, qwen2, qwen3; did you mean 'llama'?"),
        ("llama", {"model_type": "gemma3"}, "model_type=gemma3 is none of the decoders read here: gpt2, llama"),
        ("llama", rope("yarn", factor=2.0), "rope_type=yarn must be one of default, linear, llama3"),
        ("llama", rope("dynamic", factor=2.0), "rope_type=dynamic must be one of"),
        ("llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5 must be 1"),
        ("llama", rope("llama3", **LLAMA3, attention_factor=2.0), "rope_parameters.attention_factor=2.0 is not known"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act=relu2 must be one of silu, swish, gelu"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ("llama", {"is_causal": False}, "is_causal=False must be true"),
        ("llama", {"hidden_size": 25}, "is (37, 20) and not (37, 25), as the settings say"),
        ("llama", {"num_hidden_layers": 4}, "the checkpoint has no tensor for blocks.3."),
        ("llama", {"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight has no place in this decoder"),
        ("llama", {"attention_bias": True}, "the checkpoint has no tensor for blocks.0.mixer.k.bias"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight is not the embedding; set it to false"),
        ("llama", {"num_key_value_heads": 2}, "num_kv_heads=2 must divide num_heads=5"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types=full_attention"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True has no equal here"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True has no equal here"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function=quick_gelu must be one of gelu_new"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(name, change, wanted, tmp_path):
    saved(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_refused(tmp_path, wanted)


def test_a_tensor_that_nobody_reads_is_an_error(tmp_path):
    saved("qwen2", tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(20)}, path)
    assert_refused(tmp_path, "model.layers.0.self_attn.o_proj.bias has no place in this decoder (left over: 1)")


def test_pickles_are_never_opened(tmp_path):
    saved("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "pytorch_model.bin is a pickle, which may run any code and is not opened")


def test_folders_that_hold_no_model_say_so(tmp_path):
    assert_refused(tmp_path / "nowhere", "no such folder")
    assert_refused(tmp_path, "it has no config.json")
    (tmp_path / "config.json").write_text("{")
    assert_refused(tmp_path, "is not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    assert_refused(tmp_path, "must hold settings (a mapping), not list")


def test_damaged_and_quantised_weights_say_so(tmp_path):
    saved("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": torch.ones(20).to(torch.float8_e4m3fn)}, path)
    assert_refused(tmp_path, "model.norm.weight is torch.float8_e4m3fn: quantised weights are not read")
    path.write_bytes(path.read_bytes()[:-7])
    assert_refused(tmp_path, "model.safetensors is damaged")
    path.unlink()
    assert_refused(tmp_path, "holds no weights: model.safetensors is missing")
