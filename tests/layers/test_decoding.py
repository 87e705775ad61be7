"""Step by step with ragged caches is the full causal forward; and where it would not be, the controls show it."""

import pytest
import torch
from test_causality import CASES, DENSE, V, block, mod, model_of, observed, observed_model

from sparsemix.layers import Ctx
from sparsemix.layers.cache import FIRST_SLOTS, Cache

pytestmark = pytest.mark.usefixtures("unchecked")

LENGTHS = [13, 5, 1, 9]
T = max(LENGTHS)


def alone(model, tokens):
    """Logits of one sequence, uncached."""
    return model(tokens[None], Ctx(causal=True)).logits[0]


def sequences():
    return [torch.randint(V, (n,)) for n in LENGTHS]


def padded(several, side):
    """(tokens, valid, positions) of a batch padded on one side."""
    tokens, valid = torch.randint(V, (len(several), T)), torch.zeros(len(several), T, dtype=torch.bool)
    for b, sequence in enumerate(several):
        place = slice(T - len(sequence), T) if side == "left" else slice(0, len(sequence))
        tokens[b, place], valid[b, place] = sequence, True
    return tokens, valid, (valid.cumsum(1) - 1).clamp_min(0)


def in_chunks(model, tokens, valid, cuts, cache=None):
    """Logits of a batch fed to one cache in chunks that end at `cuts`."""
    cache = cache or Cache(len(tokens))
    parts = []
    for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
        chunk = None if valid is None else valid[:, start:end]
        parts.append(model(tokens[:, start:end], Ctx(valid=chunk, causal=True, cache=cache)).logits)
    return torch.cat(parts, 1), cache


def assert_equal(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_a_padded_batch_decoded_token_by_token_is_every_sequence_alone(name, side):
    model, several = model_of(name).eval(), sequences()
    tokens, valid, positions = padded(several, side)
    logits, cache = in_chunks(model, tokens, valid, list(range(1, T + 1)))
    whole = model(tokens, Ctx(positions=positions, valid=valid, causal=True)).logits
    for b, sequence in enumerate(several):
        assert_equal(logits[b, valid[b]], alone(model, sequence))
        assert_equal(whole[b, valid[b]], alone(model, sequence))
    assert cache.seen.tolist() == LENGTHS


def gpt(middle):
    """Three blocks with learned positions, none of them turned, layer norms and an untied head."""
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "rope_theta": None, "bias": "all"}
    plain = block(DENSE | {"bias": True, "activation": "gelu_tanh"}, mixer)
    blocks = [plain, plain if middle is None else middle | {"inner": plain}, plain]
    settings = {"norm": "layer", "tie_embeddings": False, "learned_positions": T}
    return observed({"d_model": 16, "vocab_size": V, "seq_len": T, "blocks": blocks, **settings})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("middle", [None, mod(DENSE)], ids=["plain", "mod"])
def test_learned_positions_decode_padded_batches_as_every_sequence_alone(middle, side):
    model, several = gpt(middle).eval(), sequences()
    tokens, valid, positions = padded(several, side)
    logits, _ = in_chunks(model, tokens, valid, [4, *range(5, T + 1)])
    whole = model(tokens, Ctx(positions=positions, valid=valid, causal=True)).logits
    counted_slots = model(tokens, Ctx(valid=valid, causal=True)).logits
    for b, sequence in enumerate(several):
        assert_equal(logits[b, valid[b]], alone(model, sequence))
        assert_equal(whole[b, valid[b]], alone(model, sequence))
    if side == "left":
        assert (counted_slots - whole)[1, valid[1]].abs().max() > 1e-3, "a slot must be no position"


def test_a_window_forgets_by_position_and_not_by_slot():
    model, tokens = model_of("mod_window").eval(), torch.randint(V, (3, T))
    logits, cache = in_chunks(model, tokens, None, [5, *range(6, T + 1)])
    assert_equal(logits, model(tokens, Ctx(causal=True)).logits)
    mixer = model.blocks[1].inner.mixer
    assert cache.lengths("blocks.1.inner.mixer").max() > mixer.window, "the window must bite"
    mixer.window = None
    without = model(tokens, Ctx(causal=True)).logits
    mixer.window = 4
    assert (without - logits).abs().max() > 1e-3


@pytest.mark.parametrize("cuts", [[13], [1, 13], [4, 5, 12, 13], [7, 13]], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if "mod" in name])
def test_any_split_into_chunks_gives_the_same_logits(name, cuts):
    model, tokens = model_of(name).eval(), torch.randint(V, (3, T))
    logits, _ = in_chunks(model, tokens, None, cuts)
    assert_equal(logits, model(tokens, Ctx(causal=True)).logits)


def counted(model, name, tokens, ctx):
    """Tokens of every row that a layer's wrapped attention saw, from the layer's own statistics."""
    stats = model(tokens, ctx).aux.stats
    return stats[f"{name}.routed"].sum(1)


@pytest.mark.parametrize("name", ["mod_block", "mod_threshold", "mod_token_choice", "mod_strided", "mod_random"])
def test_a_routed_layer_holds_the_tokens_it_routed_and_no_others(name):
    model, tokens = model_of(name).eval(), torch.randint(V, (3, T))
    _, cache = in_chunks(model, tokens, None, [6, *range(7, T + 1)])
    routed = counted(model, "blocks.1", tokens, Ctx(causal=True))
    assert 0 < int(routed.sum()) < 3 * T
    assert cache.lengths("blocks.1.inner.mixer").tolist() == routed.tolist()
    assert cache.lengths("blocks.0.mixer").tolist() == [T] * 3
    per_token = 2 * 8 * 8  # keys and values, fp64, two of four heads: 8 of 16 channels
    assert cache.bytes() == per_token * (2 * 3 * T + int(routed.sum()))


@pytest.mark.parametrize("capacity", [0.05, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("sampling", ["threshold", "predictor", "router_bce"])
def test_every_capacity_decodes_a_ragged_batch_as_every_sequence_alone(sampling, capacity):
    model = observed_model(mod(block(DENSE), sampling=sampling, capacity=capacity)).eval()
    several = sequences()
    tokens, valid, _ = padded(several, "left")
    logits, cache = in_chunks(model, tokens, valid, [3, *range(4, T + 1)])
    routed = []
    for b, sequence in enumerate(several):
        assert_equal(logits[b, valid[b]], alone(model, sequence))
        routed += counted(model, "blocks.1", sequence[None], Ctx(causal=True)).tolist()
    assert cache.lengths("blocks.1.inner.mixer").tolist() == routed


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", ["attention", "mod_block", "mod_in_mod", "mod_threshold"])
def test_rejected_drafts_leave_no_trace(name):
    model, tokens = model_of(name).eval(), torch.randint(V, (2, T))
    draft = (tokens + 1 + torch.randint(V - 1, tokens.shape)) % V
    logits, cache = in_chunks(model, tokens[:, :6], None, [6])
    wrong, _ = in_chunks(model, draft[:, 6:10], None, [4], cache)
    cache.crop(6)
    rest, _ = in_chunks(model, tokens[:, 6:], None, [1, 7], cache)
    wanted = model(tokens, Ctx(causal=True)).logits
    assert_equal(torch.cat([logits, rest], 1), wanted)
    assert (wrong - wanted[:, 6:10]).abs().max() > 1e-3, "the draft must have been another text"


@pytest.mark.usefixtures("checked")
def test_rows_can_be_reordered_and_repeated_between_steps():
    model, tokens = model_of("mod_block").eval(), torch.randint(V, (3, T))
    _, cache = in_chunks(model, tokens[:, :7], None, [7])
    order = torch.tensor([2, 0, 0, 1])
    cache.reorder(order)
    continued = torch.randint(V, (4, 4))
    logits, _ = in_chunks(model, continued, None, [1, 4], cache)
    for b, row in enumerate(order.tolist()):
        assert_equal(logits[b], alone(model, torch.cat([tokens[row, :7], continued[b]]))[7:])


def test_the_top_k_of_a_prefill_is_another_model():
    model, tokens = model_of("mod_block").eval(), torch.randint(V, (3, T))
    logits, _ = in_chunks(model, tokens, None, [T])
    control = model(tokens, Ctx(causal=False)).logits
    assert (logits - control).abs().max() > 1e-3


def test_a_key_keeps_the_rotation_of_its_own_position():
    model, tokens = model_of("mod_block").eval(), torch.randint(V, (1, T))
    wanted = alone(model, tokens[0])
    cache, logits = Cache(1), []
    for t in range(T):
        # The control: slot for position, as if the routed layer had seen every token.
        shifted = torch.tensor([[t]]) + (t > 6) * 3
        logits.append(model(tokens[:, t : t + 1], Ctx(positions=shifted, causal=True, cache=cache)).logits[0, 0])
    assert (torch.stack(logits)[7:] - wanted[7:]).abs().max() > 1e-3


@pytest.mark.usefixtures("checked")
def test_a_store_grows_and_keeps_what_it_holds():
    model, tokens = model_of("attention").eval(), torch.randint(V, (2, 5 * FIRST_SLOTS))
    logits, cache = in_chunks(model, tokens, None, [3, 3 + FIRST_SLOTS, 5 * FIRST_SLOTS])
    assert_equal(logits, model(tokens, Ctx(causal=True)).logits)
    assert cache.lengths("blocks.1.mixer").tolist() == [5 * FIRST_SLOTS] * 2


def test_a_cache_without_causal_routing_is_refused():
    with pytest.raises(ValueError, match=r"a cache needs causal routing: pass Ctx\(causal=True, cache=...\)"):
        model_of("mod_block")(torch.randint(V, (1, 3)), Ctx(cache=Cache(1)))


@pytest.mark.parametrize("name", ["peer_layer", "pkm_layer"])
def test_a_step_of_decoding_counts_no_usage_over_a_table(name):
    model, tokens = model_of(name).eval(), torch.randint(V, (1, 3))
    assert any(key.endswith("gate_mass") for key in model(tokens, Ctx(causal=True)).aux.stats)
    said = model(tokens, Ctx(causal=True, cache=Cache(1), picks=True)).aux.stats
    assert {key.rpartition(".")[2] for key in said} == {"expert_ids", "gates"}
