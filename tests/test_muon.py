"""Muon on matrices beside torch's, and on stacks of matrices beside itself."""

import pytest
import torch
from torch import nn

from sparsemix.api import build_model, build_optimizer
from sparsemix.optim import muon

MOE = {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 6}
PEER = {"kind": "peer", "num_experts": 16, "num_heads": 2, "top_k": 3, "d_key": 4}


def block(ffn):
    return {"kind": "block", "mixer": {"kind": "attention", "num_heads": 2}, "ffn": ffn}


def model():
    blocks = [block(MOE), {"kind": "mod", "inner": block(PEER)}]
    return build_model({"d_model": 8, "vocab_size": 17, "seq_len": 9, "blocks": blocks})


@pytest.mark.parametrize("shape", [(9, 9), (5, 12), (12, 5), (2, 40)])
def test_singular_values_are_brought_near_one(shape):
    values = torch.linalg.svdvals(muon.orthogonalised(torch.randn(*shape), torch.float32))
    assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(3, 5, 12), (3, 12, 5), (2, 2, 6, 4)])
def test_a_stack_is_its_matrices_one_by_one(shape):
    x = torch.randn(*shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    flat = x.flatten(0, -3)
    wanted = torch.stack([muon.orthogonalised(matrix, torch.float32) for matrix in flat]).view(shape)
    torch.testing.assert_close(muon.orthogonalised(x, torch.float32), wanted)


def test_a_matrix_of_zeros_stays_zero():
    assert not muon.orthogonalised(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize("shape", [(9, 9), (5, 12), (12, 5)])
def test_a_matrix_moves_as_by_torchs_muon(shape, monkeypatch):
    exact = muon.orthogonalised
    # torch iterates in bf16 everywhere.
    monkeypatch.setattr(muon, "orthogonalised", lambda x: exact(x, torch.bfloat16))
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    state = {ours: {}}
    optimizer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        theirs.grad = torch.randn(shape)
        ours.grad = theirs.grad.clone()
        with torch.no_grad():
            muon.step({"params": [ours], "lr": 0.1, "weight_decay": 0.2}, state)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert torch.equal(state[ours]["momentum_buffer"], optimizer.state[theirs]["momentum_buffer"])


def test_linear_maps_and_expert_banks_go_to_muon_and_nothing_else():
    lm = model()
    optimizer = build_optimizer(lm, 1e-2, matrices="muon")
    names = {id(p): name for name, p in lm.named_parameters()}
    methods = {names[id(p)]: group["method"] for group in optimizer.param_groups for p in group["params"]}
    assert set(methods) == set(names.values())
    chosen = {name for name, method in methods.items() if method == "muon"}
    attention = {f"blocks.{path}.mixer.{part}.weight" for path in ("0", "1.inner") for part in "qkvo"}
    bank = {"blocks.0.ffn.experts.gate_up", "blocks.0.ffn.experts.down"}
    assert chosen == attention | bank | {"blocks.1.inner.ffn.query.weight"}
    assert {name for name, method in methods.items() if method == "rows"} == {
        "blocks.1.inner.ffn.w_in",
        "blocks.1.inner.ffn.w_out",
    }


def test_one_object_steps_all_and_resumes_bit_for_bit():
    tokens = torch.randint(17, (3, 9))

    def steps(lm, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            output = lm(tokens)
            (output.logits.square().mean() + sum(output.aux.losses.values())).backward()
            optimizer.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()

    whole, first, second = (model().train() for _ in range(3))
    steps(whole, build_optimizer(whole, 1e-2, matrices="muon"), 4)
    optimizer = build_optimizer(first, 1e-2, matrices="muon")
    steps(first, optimizer, 2)
    second.load_state_dict(first.state_dict())
    other = build_optimizer(second, 1e-2, matrices="muon")
    other.load_state_dict(optimizer.state_dict())
    steps(second, other, 2)
    before = dict(model().named_parameters())
    for (name, p), q in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not torch.equal(p, before[name]) or "threshold" in name, name
