import pytest
import torch
from safetensors.torch import save_file

from sparsemix import build_model, build_optimizer, checkpoint
from sparsemix.errors import DamagedError
from sparsemix.layers import Ctx, update
from sparsemix.layers.product_keys import RENAMED
from sparsemix.model import token_nats
from tiny import BLOCKS, D, T, V

pytestmark = pytest.mark.usefixtures("unchecked")


def trained(steps=2, kind="nested_threshold"):
    model = build_model({"d_model": D, "vocab_size": V, "seq_len": T, "blocks": BLOCKS[kind]}).train()
    optimizer = build_optimizer(model, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(V, (2, T), generator=generator)
        optimizer.zero_grad()
        output = model(tokens, Ctx())
        (token_nats(output.logits, tokens).mean() + sum(output.aux.losses.values())).backward()
        optimizer.step()
        update(model, output.aux.stats)
    return model, optimizer


def bits(model, optimizer):
    slots = {f"{i}.{name}": t for i, several in optimizer.state_dict()["state"].items() for name, t in several.items()}
    return {name: t.clone() for name, t in (model.state_dict() | slots).items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_load_brings_back_weights_running_state_moments_and_counters(tmp_path):
    model, optimizer = trained()
    expected, state = bits(model, optimizer), checkpoint.TrainState(step=2, cursor=4, flops=1.5e9, wall_s=0.25)
    checkpoint.save(tmp_path, state, model, optimizer)
    other, other_optimizer = trained(steps=1)
    assert checkpoint.load(tmp_path, other, other_optimizer) == state
    assert_same(bits(other, other_optimizer), expected)
    assert int(other.blocks[1].threshold.num_updates) == 2


def test_an_empty_or_missing_folder_gives_a_fresh_state_and_changes_nothing(tmp_path):
    model, optimizer = trained(steps=1)
    expected = bits(model, optimizer)
    (tmp_path / ".step-00000004.77").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert checkpoint.load(folder, model, optimizer) == checkpoint.TrainState()
    assert_same(bits(model, optimizer), expected)


def test_the_newest_two_checkpoints_stay_and_half_written_ones_go(tmp_path):
    model, optimizer = trained(steps=1)
    half = tmp_path / ".step-00000011.123"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, checkpoint.TrainState(step=step), model, optimizer)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == [f"step-{there:08d}" for there in range(max(9, step - 1), step + 1)]
    assert checkpoint.load(tmp_path, model, optimizer).step == 11


@pytest.mark.parametrize("call", [0, 1, "rename"])
def test_a_save_that_fails_anywhere_leaves_the_former_checkpoint(tmp_path, monkeypatch, call):
    model, optimizer = trained(steps=1)
    checkpoint.save(tmp_path, checkpoint.TrainState(step=1), model, optimizer)
    expected, calls = bits(model, optimizer), []

    def fail(*_):
        raise OSError("no space left on device")

    def failing(tensors, path):
        calls.append(path)
        return fail() if len(calls) == call + 1 else save_file(tensors, path)

    if call == "rename":
        monkeypatch.setattr(type(tmp_path), "replace", fail)
    else:
        monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, checkpoint.TrainState(step=2), *trained(steps=2))
    monkeypatch.undo()
    assert checkpoint.load(tmp_path, model, optimizer).step == 1
    assert_same(bits(model, optimizer), expected)


def test_saving_a_step_again_never_leaves_a_moment_without_its_checkpoint(tmp_path, monkeypatch):
    model, optimizer = trained(steps=1)
    checkpoint.save(tmp_path, checkpoint.TrainState(step=1), model, optimizer)
    (tmp_path / ".step-00000000.7").mkdir()
    there, gone = tmp_path / "step-00000001", []
    real = checkpoint.delete

    def watched(path):
        gone.append((real(path), (there / "state.json").is_file()))

    monkeypatch.setattr(checkpoint, "delete", watched)
    checkpoint.save(tmp_path, checkpoint.TrainState(step=1), model, optimizer)
    assert gone and all(whole for _, whole in gone)
    assert [path.name for path in tmp_path.iterdir()] == [there.name]


def test_weights_with_another_name_or_shape_are_refused(tmp_path):
    model, _ = trained(steps=1, kind="dense")
    checkpoint.save_weights(model, tmp_path / "model.safetensors")
    moe, _ = trained(steps=1, kind="moe")
    with pytest.raises(RuntimeError, match=r"blocks\.1\.ffn"):
        checkpoint.load_weights(moe, tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_a_checkpoint_under_the_names_of_earlier_versions_is_read_with_its_moments(kind, tmp_path):
    model, optimizer = trained(kind=kind)
    expected, old = bits(model, optimizer), {new: name for name, new in RENAMED.items()}
    todays = model.state_dict().keys()

    def under_old_names(module, state, prefix, metadata):
        for key in list(state):
            head, dot, own = key.rpartition(".")
            state[f"{head}{dot}{old.get(own, own)}"] = state.pop(key)

    hook = model.register_state_dict_post_hook(under_old_names)
    assert model.state_dict().keys() != todays
    checkpoint.save(tmp_path, checkpoint.TrainState(step=2), model, optimizer)
    hook.remove()
    other, other_optimizer = trained(steps=1, kind=kind)
    checkpoint.load(tmp_path, other, other_optimizer)
    assert_same(bits(other, other_optimizer), expected)


def spoil(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-9], "bit": content[:-1] + bytes([content[-1] ^ 1])}[how])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("how", ["empty", "cut", "bit", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, file, how):
    model, optimizer = trained(steps=1, kind="dense")
    checkpoint.save(tmp_path, checkpoint.TrainState(step=1), model, optimizer)
    expected, said = bits(model, optimizer), []
    newer = trained(steps=2, kind="dense")
    checkpoint.save(tmp_path, checkpoint.TrainState(step=2), *newer)
    spoil(tmp_path / "step-00000002" / file, how)
    assert checkpoint.load(tmp_path, *newer, said.append).step == 1
    assert_same(bits(*newer), expected)
    assert len(said) == 1 and "step-00000002 is damaged" in said[0] and "step-00000001" in said[0]
    # It is neither taken the next time nor in the way of its own step.
    checkpoint.save(tmp_path, checkpoint.TrainState(step=2), *newer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert checkpoint.load(tmp_path, *newer, said.append).step == 2 and len(said) == 1


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_without_a_word(tmp_path):
    model, optimizer = trained(steps=1, kind="dense")
    checkpoint.save(tmp_path, checkpoint.TrainState(step=1), model, optimizer)
    spoil(tmp_path / "step-00000001" / "state.json", "empty")
    with pytest.raises(DamagedError, match=r"no whole checkpoint \(step-00000001: state.json has 0 of"):
        checkpoint.load(tmp_path, model, optimizer)
