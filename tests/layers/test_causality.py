"""Later tokens, and other documents, cannot change a logit; and where they can, the controls show it."""

from functools import lru_cache

import pytest
import torch

from sparsemix.api import build_model
from sparsemix.config import parse
from sparsemix.layers import Ctx, LayerConfig, update

pytestmark = pytest.mark.usefixtures("unchecked")

B, T, V = 2, 13, 11
ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2}
DENSE = {"kind": "dense", "d_ff": 8}
MOE = {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 5, "shared_d_ff": 3}
MOE_CAPACITY = MOE | {"capacity_factor": 0.5}
EXPERT_CHOICE = {"kind": "expert_choice", "num_experts": 4, "capacity_factor": 1.5, "d_ff": 5}
MODE = {"kind": "mode", "num_experts": 4, "num_noop": 2, "top_k": 2, "d_ff": 5}
PEER = {"kind": "peer", "num_experts": 16, "num_heads": 2, "top_k": 3, "d_key": 4}
TERNARY = {"precision": "ternary"}
PKM = {"kind": "pkm", "num_values": 16, "num_heads": 2, "top_k": 3, "d_key": 4}
MH_MOE = {"kind": "mh_moe", "num_heads": 2, "inner": MOE}


def block(ffn, mixer=ATTENTION):
    return {"kind": "block", "mixer": mixer, "ffn": ffn}


def mod(inner, **settings):
    return {"kind": "mod", "capacity": 0.4, "predictor_width": 4, "inner": inner, **settings}


QWEN = ATTENTION | {"d_head": 6, "bias": "all", "qk_norm": "head", "window": 4}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_seq_len": 40}
CASES = {
    "attention": ATTENTION,
    "attention_window": ATTENTION | {"window": 3},
    "attention_qwen": QWEN,
    "attention_olmo": ATTENTION | {"qk_norm": "full", "rope_scaling": LLAMA3},
    "attention_unturned": ATTENTION | {"rope_theta": None},
    "dense": DENSE,
    "moe": MOE,
    "moe_bias": MOE | {"bias_rate": 0.1},
    "moe_capacity": MOE_CAPACITY,
    "moe_capacity_first_choice": MOE_CAPACITY | {"top_k": 1},
    "moe_capacity_for_all": MOE_CAPACITY | {"capacity_factor": 2.0},
    "expert_choice": EXPERT_CHOICE,
    "expert_choice_batch": EXPERT_CHOICE | {"group": "batch", "shared_d_ff": 3},
    "expert_choice_of_all": EXPERT_CHOICE | {"capacity_factor": 4.0},
    "mode": MODE,
    "mode_choice": MODE | {"routing": "expert_choice"},
    "mode_choice_of_all": MODE | {"routing": "expert_choice", "top_k": 6},
    "peer_batch": PEER,
    "peer_layer": PEER | {"query_norm": "layer"},
    "peer_none": PEER | {"query_norm": "none"},
    "pkm_batch": PKM,
    "pkm_layer": PKM | {"query_norm": "layer"},
    "pkm_none": PKM | {"query_norm": "none"},
    "mh_moe": MH_MOE,
    "mh_moe_pkm": MH_MOE | {"inner": PKM},
    "mh_moe_peer": MH_MOE | {"inner": PEER},
    "ternary": block(MH_MOE | TERNARY | {"inner": MOE | TERNARY}, ATTENTION | TERNARY),
    "mh_moe_choice": MH_MOE | {"inner": EXPERT_CHOICE},
    "block": block(DENSE),
    "mod_dense": mod(DENSE),
    "block_layer_norm": block(DENSE | {"bias": True}) | {"norm": "layer"},
    "mod_window": mod(block(DENSE, QWEN)),
    "mod_everything": mod(block(DENSE), capacity=1.0),
    "mod_block": mod(block(DENSE)),
    "mod_threshold": mod(block(DENSE), sampling="threshold"),
    "mod_router_bce": mod(block(DENSE), sampling="router_bce"),
    "mod_token_choice": mod(block(DENSE), selector="token_choice"),
    "mod_strided": mod(block(DENSE), selector="strided"),
    "mod_random": mod(block(DENSE), selector="random"),
    "mod_count": mod(block(DENSE), capacity=5),
    "mod_full": mod(block(DENSE), block_output="full", gate="raw"),
    "mod_moe": mod(block(MOE)),
    "mod_pkm": mod(block(PKM)),
    "mod_choice": mod(block(EXPERT_CHOICE)),
    "mod_mode": mod(block(MODE)),
    "mod_peer": mod(block(PEER)),
    "mod_mh_moe": mod(block(MH_MOE)),
    "mod_in_mod": mod(mod(block(DENSE)), capacity=0.7),
    "mod_ffn": block(mod(DENSE)),
    "mod_mixer": block(DENSE, mixer=mod(ATTENTION)),
}
# Feed-forwards and mixers, which need a block around them.
FRAMED = {name for name, raw in CASES.items() if raw["kind"] not in ("block", "mod")}
# Look-ahead by comparing tokens: unlike batch statistics, it leaks in evaluation mode too.
COMPARING = [
    name
    for name, raw in CASES.items()
    if parse(LayerConfig, raw).looks_ahead and name not in ("peer_batch", "pkm_batch", "mh_moe_peer", "mh_moe_pkm")
]


@lru_cache
def model_of(name):
    """`observed_model` around a case."""
    return observed_model(block(CASES[name]) if name in FRAMED else CASES[name])


def observed_model(middle):
    """An observed fp64 model whose first and last blocks are plain, so that a leak can travel."""
    return observed({"d_model": 16, "vocab_size": V, "seq_len": T, "blocks": [block(DENSE), middle, block(DENSE)]})


def observed(raw):
    """An fp64 model after one step of observing, whose tokens and scores lie well apart."""
    model = build_model(raw).double().requires_grad_(False)
    with torch.no_grad():
        model.embed.weight.mul_(50)
        for parameter_name, parameter in model.named_parameters():
            if "router" in parameter_name:
                parameter.mul_(50)
    update(model, model.train()(torch.randint(V, (B, T))).aux.stats)
    return model


def with_future_changed(tokens, t):
    changed = tokens.clone()
    changed[:, t:] = (changed[:, t:] + 1 + torch.randint(V - 1, changed[:, t:].shape)) % V
    return changed


def seeded(model, tokens, ctx):
    """The model's output; a layer that draws noise draws the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return model(tokens, ctx)


def largest_move_of_the_past(model, ctx):
    tokens = torch.randint(V, (B, T))
    moves = []
    for t in (1, 6, T - 1):
        a, b = (seeded(model, x, ctx).logits for x in (tokens, with_future_changed(tokens, t)))
        assert (a[:, t:] - b[:, t:]).abs().max() > 1e-3, "a test in which nothing changes proves nothing"
        moves.append(float((a[:, :t] - b[:, :t]).abs().max()))
    return max(moves)


@pytest.mark.parametrize("name", CASES)
def test_future_tokens_cannot_change_past_logits(name):
    model = model_of(name).eval()
    positions = torch.arange(T) * 3 + torch.arange(B)[:, None]
    doc_ids = (torch.arange(T) >= 6).long().expand(B, T)
    for ctx in (None, Ctx(positions, doc_ids, causal=True)):
        assert largest_move_of_the_past(model, ctx) <= 1e-11


@pytest.mark.parametrize("name", CASES)
def test_looking_ahead_while_training_moves_past_logits_exactly_where_the_settings_say_so(name):
    model = model_of(name).train()
    # A leak through batch statistics is thin, so it gets several tries.
    moved = max(largest_move_of_the_past(model, Ctx(causal=False)) for _ in range(3))
    says = parse(LayerConfig, CASES[name]).looks_ahead
    assert says == model.config.looks_ahead
    assert (moved > 1e-3) if says else (moved <= 1e-11)


@pytest.mark.parametrize("name", COMPARING)
def test_top_k_at_evaluation_leaks_so_it_is_never_the_default(name):
    model, tokens = model_of(name).eval(), torch.randint(V, (B, T))
    assert max(largest_move_of_the_past(model, Ctx(causal=False)) for _ in range(3)) > 1e-3
    assert torch.equal(model(tokens).logits, model(tokens, Ctx(causal=True)).logits)


DOC_IDS = torch.tensor([[0] * 5 + [1] * 8, [3] * 9 + [4] * 4])


def largest_move_of_document_two(model, doc_ids):
    tokens = torch.randint(V, (B, T))
    changed = torch.where(DOC_IDS[:, :1] == DOC_IDS, with_future_changed(tokens, 0), tokens)
    second = DOC_IDS[:, :1] != DOC_IDS
    ctx = Ctx(doc_ids=doc_ids, causal=True)
    a, b = (model(x, ctx).logits for x in (tokens, changed))
    assert (a[~second] - b[~second]).abs().max() > 1e-3
    return float((a[second] - b[second]).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_one_document_cannot_change_the_logits_of_another(name):
    model = model_of(name).eval()
    assert largest_move_of_document_two(model, DOC_IDS) <= 1e-11
    assert largest_move_of_document_two(model, None) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_no_real_logit_loss_or_statistic(name):
    model, tokens = model_of(name), torch.randint(V, (B, T))
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 9:] = False
    valid[1, [0, 4]] = False
    other = torch.where(valid, tokens, (tokens + 1) % V)
    # Training, causal evaluation, and evaluation by top-k.
    for training, causal in ((True, False), (False, True), (False, False)):
        ctx = Ctx(valid=valid, causal=causal)
        a, b = (seeded(model.train(training), x, ctx) for x in (tokens, other))
        assert torch.isfinite(b.logits).all()
        torch.testing.assert_close(a.logits[valid], b.logits[valid], rtol=0, atol=1e-11)
        for mine, theirs in ((a.aux.losses, b.aux.losses), (a.aux.stats, b.aux.stats)):
            assert set(mine) == set(theirs)
            for key, value in mine.items():
                torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-11, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_its_batch_in_evaluation(name):
    model, tokens = model_of(name).eval(), torch.randint(V, (5, T))
    logits = model(tokens).logits
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(model(tokens[order]).logits, logits[order], rtol=0, atol=1e-11)
    torch.testing.assert_close(model(tokens[2:3]).logits, logits[2:3], rtol=0, atol=1e-11)
