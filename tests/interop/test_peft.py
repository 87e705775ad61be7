"""Adapters of the package peft on our models: they find linear layers, expert banks and tables, and merge exactly."""

import pytest
import torch
from hf_models import hf_model
from torch.nn import functional as F

from sparsemix.interop.hf import SparsemixForCausalLM
from tiny import T, V

peft = pytest.importorskip("peft", reason="adapters need peft")

# What peft asks transformers for by an older name.
pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
LINEAR = ["q", "k", "v", "o", "up", "gate", "down", "head", "merge", "query"]
STACKED = {"moe": ["experts.gate_up", "experts.down"], "peer": ["ffn.w_in", "ffn.w_out"], "mh_moe": ["experts.down"]}


def tokens(seed=1):
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))


def adapted(name, **asked):
    """A model with adapters that have learned something, and its logits before them."""
    model = hf_model(name)
    before = model(tokens()).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **asked)).double()
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
    return wrapped.eval(), before


def assert_merges(wrapped, before, moved=1e-3):
    with torch.no_grad():
        logits = wrapped(tokens()).logits
        assert (logits - before).abs().max() > moved
        wrapped.merge_adapter()
        torch.testing.assert_close(wrapped(tokens()).logits, logits, rtol=0, atol=1e-10)
        wrapped.unmerge_adapter()
        torch.testing.assert_close(wrapped(tokens()).logits, logits, rtol=0, atol=1e-10)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(tokens()).logits, before, rtol=0, atol=1e-10)
        merged = wrapped.merge_and_unload()
        assert isinstance(merged, SparsemixForCausalLM)
        torch.testing.assert_close(merged(tokens()).logits, logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["dense", "moe", "peer", "pkm", "mh_moe", "mod", "expert_choice", "mode"])
def test_adapters_of_all_linear_layers_merge_and_unmerge(name):
    wrapped, before = adapted(name, target_modules="all-linear")
    found = {key.split(".lora_")[0].rpartition(".")[2] for key, _ in wrapped.named_parameters() if "lora_" in key}
    assert {"q", "k", "v", "o"} <= found <= set(LINEAR), found
    assert_merges(wrapped, before)


@pytest.mark.parametrize("name", STACKED)
def test_adapters_of_expert_banks_and_tables_merge_and_unmerge(name):
    wrapped, before = adapted(name, target_modules=[], target_parameters=STACKED[name])
    assert_merges(wrapped, before)


def test_training_adapters_of_tables_moves_running_state():
    """A wrapper around a layer gives its modules longer names than its statistics have."""
    wrapped, _ = adapted("peer", target_modules=[], target_parameters=STACKED["peer"])
    state = {name: buffer for name, buffer in wrapped.named_buffers() if name.endswith("query_norm.num_updates")}
    before = {name: int(buffer) for name, buffer in state.items()}
    for _ in range(2):
        wrapped.train()(tokens(), labels=tokens()).loss.backward()
        wrapped.zero_grad()
    wrapped.eval()
    assert state and all(int(buffer) == before[name] + 2 for name, buffer in state.items())
    assert {key for key, p in wrapped.named_parameters() if p.requires_grad} == {
        key for key, _ in wrapped.named_parameters() if "lora_" in key
    }


def test_an_adapter_of_the_head_is_in_the_loss():
    wrapped, before = adapted("untied", target_modules=["lm_head"])
    assert_merges(*adapted("untied", target_modules=["lm_head"]))
    wanted = F.cross_entropy(wrapped(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert (F.cross_entropy(before[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()) - wanted).abs() > 1e-3
    for mode in (True, False):
        loss = wrapped.train(mode)(tokens(), labels=tokens()).loss
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-11)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for key, p in wrapped.named_parameters() if "lora_" in key)


def test_adapters_and_what_they_merge_into_are_saved_and_generate_the_same(tmp_path):
    asked = {"target_modules": "all-linear", "target_parameters": STACKED["moe"], "modules_to_save": ["router"]}
    wrapped, _ = adapted("moe", **asked)
    generate = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = wrapped.generate(input_ids=tokens(), **generate)
    wrapped.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(hf_model("moe"), tmp_path / "adapters").double().eval()
    assert torch.equal(again.generate(input_ids=tokens(), **generate), wanted)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = SparsemixForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(merged(tokens()).logits, wrapped(tokens()).logits, rtol=0, atol=1e-10)
    assert torch.equal(merged.generate(tokens(), **generate), wanted)
