"""A model's folder is read as it was written; what is not one is refused in one line."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsemix import checkpoint, load_model, saved, trained
from sparsemix.config import ConfigError, parse
from sparsemix.data import prepare
from sparsemix.data.tokenizer import train_tokenizer
from sparsemix.durable import SEAL
from sparsemix.interop.families.folder import read_tensors
from sparsemix.layers import Ctx, update
from sparsemix.layers.packed import pack_ternary
from sparsemix.layers.product_keys import RENAMED
from sparsemix.model import ModelConfig
from sparsemix.train import train
from tiny import BLOCKS, D, T, V, run_config, unchecked_shapes, write_corpus


def built(name):
    raw = {"d_model": D, "vocab_size": V, "seq_len": T, "blocks": BLOCKS[name]}
    model = parse(ModelConfig, raw).build(3)
    with torch.no_grad():
        # No value may be what building gives.
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 1)
    return model


def logits(model):
    tokens = torch.arange(2 * T).view(2, T) % V
    with torch.no_grad():
        return model.eval()(tokens, Ctx(causal=True)).logits


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_read_is_bit_for_bit_what_was_written(name, tmp_path):
    model = built(name)
    saved.write(model, tmp_path / "m")
    again = saved.read(tmp_path / "m").model
    assert again.config == model.config and not again.training
    assert model.state_dict().keys() == again.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert torch.equal(logits(again), logits(model))


def test_several_files_with_the_prefix_of_a_wrapper_are_one_model(tmp_path):
    model = built("moe")
    saved.write(model, tmp_path)
    tensors = {f"model.{name}": tensor for name, tensor in load_file(tmp_path / saved.WEIGHTS).items()}
    (tmp_path / saved.WEIGHTS).unlink()
    names = {f"model-0000{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, part in names.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {key: name for name, part in names.items() for key in part}}
    (tmp_path / f"{saved.WEIGHTS}.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(saved.read(tmp_path).model), logits(model))
    saved.seal_model(tmp_path)
    assert torch.equal(logits(saved.read(tmp_path).model), logits(model))
    for name in (*names, saved.INDEX):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        for read in (saved.read, read_tensors):
            with pytest.raises(ConfigError, match=f"is damaged: {name} is not what was written"):
                read(tmp_path)
        (tmp_path / name).write_bytes(whole)


def unsealed(spoil):
    """What a person who knows of the checksums does."""

    def spoiled(folder):
        spoil(folder)
        (folder / SEAL).unlink()

    return spoiled


def edit(folder, **changes):
    (folder / SEAL).unlink()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder):
    path = folder / saved.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def misfit(folder):
    tensors = load_file(folder / saved.WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "norm" not in name}, folder / saved.WEIGHTS)


def tokenizer_of(folder, size):
    words = [f"word{i} and {i * 7919}" for i in range(4000)]
    (folder / "tokenizer.json").write_text(train_tokenizer(words, size).to_str())


BAD = {
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "is not valid JSON": unsealed(lambda folder: (folder / "config.json").write_text("{")),
    "model_type=llama must be sparsemix": lambda folder: edit(folder, model_type="llama"),
    "format=3 must be at most 2": lambda folder: edit(folder, format=3, sparsemix_version="9.0"),
    "written by 9.0": lambda folder: edit(folder, format=3, sparsemix_version="9.0"),
    "holds no settings": lambda folder: edit(folder, settings=None),
    "d_model=1": lambda folder: edit(
        folder, settings=json.loads((folder / "config.json").read_text())["settings"] | {"d_model": 1}
    ),
    "is missing": lambda folder: (folder / saved.WEIGHTS).unlink(),
    "is damaged": unsealed(truncate),
    "model.safetensors has ": truncate,
    "does not fit the settings": unsealed(misfit),
    "does not match the model: it has 400 ids, vocab_size=300": unsealed(lambda folder: tokenizer_of(folder, 400)),
}


@pytest.mark.parametrize("told", BAD)
def test_a_folder_that_is_no_whole_model_is_refused_in_one_line(told, tmp_path):
    saved.write(built("dense"), tmp_path)
    BAD[told](tmp_path)
    with pytest.raises(ConfigError) as error:
        saved.read(tmp_path)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_runs_folder_and_its_model_folder_are_the_same_model(tmp_path):
    data = write_corpus(tmp_path)
    shards = prepare(data, tmp_path / "data")
    with unchecked_shapes():
        train(run_config(data, BLOCKS["nested"], steps=6), tmp_path / "run", shards)
    run, alone = trained.load(tmp_path / "run"), trained.load(tmp_path / "run" / "model")
    assert torch.equal(logits(run.model), logits(alone.model)) and torch.equal(
        logits(load_model(tmp_path / "run")), logits(run.model)
    )
    assert run.config is not None and run.result is not None and alone.config is None
    assert run.tokenizer is not None and alone.tokenizer is not None
    assert run.tokenizer.to_str() == alone.tokenizer.to_str() == shards.tokenizer().to_str()
    # A run of an earlier version has neither settings nor tokenizer beside its weights.
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "run" / "model" / name).unlink()
    older = trained.load(tmp_path / "run")
    assert torch.equal(logits(older.model), logits(run.model))
    assert older.tokenizer is not None and older.tokenizer.to_str() == run.tokenizer.to_str()


def test_an_unfinished_run_and_a_comparison_are_told_apart(tmp_path):
    data = write_corpus(tmp_path)
    shards = prepare(data, tmp_path / "data")
    with unchecked_shapes():
        train(run_config(data, BLOCKS["dense"], steps=3), tmp_path / "run", shards)
    (tmp_path / "run" / "model" / saved.WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="holds no trained model; finish the run"):
        trained.load(tmp_path / "run")
    (tmp_path / "plan.yaml").touch()
    with pytest.raises(ConfigError, match="holds a comparison; name the folder of one of its runs"):
        trained.load(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere is no model: it has no config\.json"):
        trained.load(tmp_path / "nowhere")


TERNARY = {"d_model": D, "vocab_size": V, "seq_len": T, "blocks": BLOCKS["moe"], "precision": "ternary"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_is_read_packed_and_bit_for_bit(dtype, tmp_path):
    model = pack_ternary(parse(ModelConfig, TERNARY).build(3)).to(dtype)
    saved.write(model, tmp_path)
    again = saved.read(tmp_path).model
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys() and {v.dtype for v in state.values()} >= {torch.uint8, dtype}
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert torch.equal(logits(again), logits(model))
    assert not any(tensor.is_meta for tensor in again.state_dict().values())


def test_a_packed_model_whose_warm_up_is_over_is_read_and_a_damaged_one_refused(tmp_path):
    precision = {"weights": "ternary", "warmup_steps": 1}
    model = parse(ModelConfig, TERNARY | {"precision": precision}).build(3)
    update(model, {})
    wanted = logits(pack_ternary(model))
    saved.write(model, tmp_path)
    assert torch.equal(logits(saved.read(tmp_path).model), wanted)
    tensors = load_file(tmp_path / saved.WEIGHTS)
    tensors["blocks.0.mixer.q.weight.codes"] |= 3
    save_file(tensors, tmp_path / saved.WEIGHTS)
    (tmp_path / SEAL).unlink()
    with pytest.raises(ConfigError, match=r"does not fit the settings .*q\.weight\.codes: packed weights hold a code"):
        saved.read(tmp_path)


def old_names(path):
    """The weights as versions before format 2 wrote them."""
    old = {new: name for name, new in RENAMED.items()}
    tensors = {name: name.rpartition(".") for name in load_file(path)}
    assert any(own in old for _, _, own in tensors.values())
    save_file(
        {f"{head}{dot}{old.get(own, own)}": load_file(path)[name] for name, (head, dot, own) in tensors.items()}, path
    )


@pytest.mark.parametrize("name", ["peer", "pkm", "nested"])
def test_weights_under_the_names_of_earlier_versions_are_read(name, tmp_path):
    model, again = built(name), built(name)
    saved.write(model, tmp_path / "m")
    checkpoint.save_weights(model, tmp_path / "weights.safetensors")
    wanted = load_file(tmp_path / "m" / saved.WEIGHTS)
    for path in (tmp_path / "m" / saved.WEIGHTS, tmp_path / "weights.safetensors"):
        old_names(path)
        assert load_file(path).keys() != wanted.keys()
    edit(tmp_path / "m", format=1)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    checkpoint.load_weights(again, tmp_path / "weights.safetensors")
    for state in (again.state_dict(), saved.read(tmp_path / "m").model.state_dict()):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in state.items())


@pytest.mark.parametrize("file", [saved.WEIGHTS, "config.json", "tokenizer.json"])
def test_a_changed_bit_in_a_models_folder_is_named(file, tmp_path):
    words = [f"word{i} and {i * 7919}" for i in range(400)]
    saved.write(built("dense"), tmp_path, train_tokenizer(words, V))
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    with pytest.raises(ConfigError, match=f"{file} is not what was written; copy it anew, or.*delete"):
        saved.read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_the_name_of_their_tensor(value, tmp_path):
    model = built("moe")
    with torch.no_grad():
        model.blocks[1].ffn.router.weight[1, 2] = value
    saved.write(model, tmp_path)
    with pytest.raises(ConfigError, match=r"1 of 64 numbers of blocks\.1\.ffn\.router\.weight are not finite"):
        saved.read(tmp_path)


def test_an_export_on_a_full_disk_leaves_nothing_and_names_it(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sparsemix.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as raised, saved.whole(tmp_path / "deep" / "to") as to:
        saved.write(built("dense"), to)
    assert raised.value.errno == 28 and raised.value.filename and not list(tmp_path.iterdir())
