"""What is saved is loaded bit for bit, through whichever door."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import hf_model, settings
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import sparsemix
from sparsemix import saved
from sparsemix.config import ConfigError
from sparsemix.data.tokenizer import encode_batch, end_of_text, train_tokenizer
from sparsemix.interop.hf import SparsemixConfig, SparsemixForCausalLM, SparsemixModel, wrap_tokenizer
from sparsemix.layers.product_keys import RENAMED
from tiny import BLOCKS, MOE, D, T, V, block, mod

pytestmark = pytest.mark.usefixtures("unchecked")


STATES = {
    **BLOCKS,
    "untied": BLOCKS["dense"],
    "annealed": [mod(block({"kind": "dense", "d_ff": 40, "precision": "ternary"}), anneal_steps=5)],
}


def away(model):
    """Every buffer away from its initial value too."""
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(torch.rand_like(buffer) if buffer.is_floating_point() else 1)
    return model


def assert_same(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("name", STATES)
def test_what_is_loaded_is_bit_for_bit_what_was_saved(name, tmp_path):
    model = away(hf_model(name, blocks=STATES[name]))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    heads = [key for key in load_file(tmp_path / "model.safetensors") if key.endswith("lm_head.weight")]
    assert heads == (["model.lm_head.weight"] if name == "untied" else [])
    assert not again.training and again.config.settings == model.config.settings
    # And by the library alone.
    assert_same(model.model.float(), saved.read(tmp_path).model)


@pytest.mark.parametrize("how", [{"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"dtype": torch.float64}], ids=str)
def test_every_way_of_loading_gives_the_same_bits(how, tmp_path):
    if "device_map" in how:
        pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model = away(hf_model("nested_threshold"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, **how))
    assert_same(model.model.float(), saved.read(tmp_path).model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_smaller_number_type_leaves_running_state_alone(tmp_path, dtype):
    biased = [*BLOCKS["nested_threshold"], block(MOE | {"bias_rate": 0.001})]
    model = away(hf_model("own", blocks=biased).float())
    model.save_pretrained(tmp_path)
    state, buffers = model.state_dict(), dict(model.named_buffers())
    assert {"bias", "mean", "square", "threshold", "num_updates"} <= {name.rpartition(".")[2] for name in buffers}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for again in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path).to(dtype)):
        for name, tensor in again.state_dict().items():
            wanted = state[name] if name in buffers else state[name].to(dtype)
            assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    # Twenty steps of its own.
    bias, start = loaded.model.blocks[-1].ffn.bias, buffers["model.blocks.3.ffn.bias"]
    for _ in range(20):
        loaded.model.blocks[-1].ffn.update({"load": torch.tensor([0.7, 0.1, 0.1, 0.1])})
    torch.testing.assert_close(bias - start, 0.02 * torch.tensor([-1.0, 1, 1, 1]), rtol=1e-3, atol=0)


def test_a_capacity_goes_on_falling_where_it_was(tmp_path):
    model = hf_model("own", blocks=STATES["annealed"])
    model.model.blocks[0].annealing.step.fill_(4)
    model.eval().train().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.blocks[0].slack == model.model.blocks[0].slack < 1


@pytest.mark.parametrize("name", ["dense", "nested", "random"])
def test_a_runs_model_folder_loads_as_it_is(name, tmp_path):
    lm = away(hf_model(name)).model.float()
    texts = [f"word{i % 50} and {i}" for i in range(300)]
    tokenizer = train_tokenizer(texts, V)
    saved.write(lm, tmp_path, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(lm, model.model)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts[:3])["input_ids"] == [found.tolist() for found in encode_batch(tokenizer, texts[:3])]
    batch = again(["word1", "word1 and 7"], padding=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3).shape[1] <= batch["input_ids"].shape[1] + 3
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == again.eos_token_id


def test_missing_weights_are_drawn_and_loaded_ones_stay(tmp_path):
    model = away(hf_model("nested").float())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = ["model.blocks.0.ffn.router.weight", "model.blocks.1.inner.ffn.query_norm.mean", "model.embed.weight"]
    save_file({name: t for name, t in tensors.items() if name not in gone}, tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor) == (name not in gone), name
    assert 0.015 < again[gone[0]].std() < 0.025 and 0.015 < again[gone[2]].std() < 0.025
    assert not again[gone[1]].any()


@pytest.mark.parametrize("name", ["peer", "pkm"])
def test_folders_of_earlier_versions_load_and_are_saved_under_todays_names(name, tmp_path):
    model = away(hf_model(name).float())
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    wanted = load_file(path)
    old = {f".{new}": f".{name}" for name, new in RENAMED.items()}
    tensors = dict(wanted)
    for new, before in old.items():
        tensors = {key.replace(new, before): tensor for key, tensor in tensors.items()}
    assert tensors.keys() != wanted.keys()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 1}))
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert_same(model, again)
    for which, loaded in enumerate((model, again)):
        loaded.save_pretrained(tmp_path / str(which))
        assert load_file(tmp_path / str(which) / "model.safetensors").keys() == wanted.keys()
        assert json.loads((tmp_path / str(which) / "config.json").read_text())["format"] == saved.FORMAT


@pytest.mark.parametrize("name", ["nested", "untied"])
def test_a_model_without_its_head_gives_what_the_head_would_read(name, tmp_path):
    model, ids = hf_model(name).float(), torch.randint(V, (2, T))
    model.save_pretrained(tmp_path)
    headless, told = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(headless) is SparsemixModel and not told["missing_keys"] and not told["unexpected_keys"]
    assert not any("lm_head" in key for key in headless.state_dict())
    out = headless(ids, output_hidden_states=True, output_router_logits=True)
    wanted = model(ids, output_hidden_states=True, output_router_logits=True)
    assert torch.equal(out.last_hidden_state, wanted.hidden_states[-1])
    torch.testing.assert_close(F.linear(out.last_hidden_state, model.model.head), wanted.logits)
    assert len(out.router_logits) == len(wanted.router_logits) and len(out.hidden_states) == len(wanted.hidden_states)
    more = headless(ids[:, :1], past_key_values=out.past_key_values).last_hidden_state
    assert torch.equal(
        more, model(ids[:, :1], past_key_values=wanted.past_key_values, output_hidden_states=True).hidden_states[-1]
    )
    headless.save_pretrained(tmp_path / "again")
    assert_same(headless, AutoModel.from_pretrained(tmp_path / "again"))
    if name == "nested":
        assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    with pytest.raises(ValueError, match="no head to generate with: load it by AutoModelForCausalLM"):
        headless.generate(ids)
    with pytest.raises(ValueError, match="labels: a loss needs a head"):
        headless(ids, labels=ids)


def test_tying_can_be_asked_for_under_transformers_name(tmp_path):
    config = SparsemixConfig(settings=settings("dense"), tie_word_embeddings=False)
    assert config.settings["tie_embeddings"] is config.tie_word_embeddings is False
    model = SparsemixForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and again.get_output_embeddings() is not None
    assert_same(model, again)
    config.tie_word_embeddings = True
    tied = SparsemixForCausalLM(config)
    assert tied.get_output_embeddings() is None and SparsemixConfig().tie_word_embeddings
    with pytest.raises(ConfigError, match="tie_embeddings=maybe input should be a valid boolean"):
        config.tie_word_embeddings = "maybe"


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_local_experts", "max_position_embeddings"])
def test_a_setting_that_follows_from_others_is_refused_in_one_line(name, caplog):
    for setting in (
        lambda: SparsemixConfig(settings=settings("dense"), **{name: 32}),
        lambda: setattr(SparsemixConfig(settings=settings("dense")), name, 32),
    ):
        with pytest.raises(
            ConfigError, match=rf"^{name}=32 cannot be set: it follows from `settings`; change it there$"
        ):
            setting()
    assert not caplog.text


def test_settings_are_read_under_the_usual_names():
    config = SparsemixConfig(settings=settings("moe"))
    told = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": T,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
    }
    assert {name: getattr(config, name) for name in told} == told
    assert SparsemixConfig(settings=settings("peer")).num_experts_per_tok == 8
    dense = SparsemixConfig(settings=settings("dense"))
    assert not any(
        hasattr(dense, name) for name in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")
    )
    assert AutoConfig.for_model("sparsemix", settings=settings("moe")).settings == config.settings


def test_settings_that_are_none_or_of_another_version_are_refused(tmp_path):
    bad = [BLOCKS["moe"][0], block(MOE | {"top_k": 9})]
    with pytest.raises(ConfigError, match=r"blocks\.1\.ffn\.top_k=9 must lie in"):
        SparsemixConfig(settings=settings("own", blocks=bad))
    with pytest.raises(ConfigError, match="format=3 must be at most 2"):
        SparsemixConfig(settings=settings("moe"), format=3)
    with pytest.raises(ConfigError, match="settings is missing"):
        SparsemixForCausalLM(SparsemixConfig())


def in_a_process(code, *forbidden, tmp_path):
    """Output of a program in which some packages cannot be imported."""
    source = Path(sparsemix.__file__).parents[1]
    hide = f"import sys; sys.modules.update({{name: None for name in {forbidden}}})\n"
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", hide + code],
        env={
            **os.environ,
            "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}",
            "HF_HOME": str(tmp_path / "home"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "small"
    hf_model("moe").save_pretrained(place)
    return place


LOAD = "print(type(AutoModelForCausalLM.from_pretrained({!r}{})).__module__)"
ORDERS = {
    "first": "import sparsemix\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
    "from transformers import AutoModelForCausalLM\n",
    "last": "from transformers import AutoModelForCausalLM\nimport sparsemix\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_an_import_of_the_package_is_all_that_loading_needs(order, folder, tmp_path):
    ran = in_a_process(ORDERS[order] + LOAD.format(str(folder), ""), tmp_path=tmp_path)
    assert ran.stdout.strip() == "sparsemix.interop.hf_model", ran.stderr


def test_trust_remote_code_finds_the_package_and_saves_itself_again(folder, tmp_path):
    again = tmp_path / "again"
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"model.save_pretrained({str(again)!r})\n"
        "print(type(model).__module__.rpartition('.')[2])\n"
        f"AutoModelForCausalLM.from_pretrained({str(again)!r}, trust_remote_code=True)"
    )
    ran = in_a_process(code, tmp_path=tmp_path)
    assert ran.stdout.strip() == "modeling_sparsemix", ran.stderr
    assert (again / "modeling_sparsemix.py").read_text() == (folder / "modeling_sparsemix.py").read_text()
    assert (
        json.loads((again / "config.json").read_text())["auto_map"]["AutoConfig"]
        == "configuration_sparsemix.SparsemixConfig"
    )


def test_without_the_package_one_line_says_that_it_is_needed(folder, tmp_path):
    code = "from transformers import AutoModelForCausalLM\n" + LOAD.format(str(folder), ", trust_remote_code=True")
    ran = in_a_process(code, "sparsemix", tmp_path=tmp_path)
    told = ran.stderr.strip().splitlines()[-1]
    assert told.startswith("ImportError: this model needs the Python package sparsemix, version")
    assert "pip install sparsemix" in told


def test_a_tokenizer_gives_the_ids_of_training(tmp_path):
    texts = [f"word{i % 50}  and {i}\n" for i in range(300)] + ["<|endoftext|> written out , he said ."]
    tokenizer = train_tokenizer(texts, V)
    wrap_tokenizer(tokenizer, T).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text, wanted in zip(texts, encode_batch(tokenizer, texts), strict=True):
        assert again(text)["input_ids"] == wanted.tolist()
        assert again.decode(wanted) == text
    assert again.eos_token_id == again.bos_token_id == again.pad_token_id == end_of_text(tokenizer)
    batch = again([*texts[:2], "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][2, 0] == 0 and again.model_max_length == T


def test_end_of_text_is_a_label_once_padding_has_a_token_of_its_own():
    """As docs/huggingface.md says."""
    model, tokenizer = hf_model("dense").float(), wrap_tokenizer(train_tokenizer(["a cat sat"] * 9, V), T)
    rows, collate = [{"input_ids": [5, 6, tokenizer.eos_token_id]}, {"input_ids": [7]}], DataCollatorForLanguageModeling
    assert tokenizer.eos_token_id not in collate(tokenizer, mlm=False)(rows)["labels"]
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    model.resize_token_embeddings(max(model.config.vocab_size, len(tokenizer)), mean_resizing=False)
    batch = collate(tokenizer, mlm=False)(rows)
    assert batch["labels"].tolist() == [[5, 6, tokenizer.eos_token_id], [-100, -100, 7]]
    assert model(**batch).loss.isfinite()
