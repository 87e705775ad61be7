"""Sliding windows: every token scored once, in exactly the stated context, whatever the batch."""

import numpy as np
import pytest
import torch

from sparsemix.api import build_model
from sparsemix.evaluate.sliding import score, windows
from sparsemix.layers import Ctx, update
from tiny import ATTENTION, BLOCKS, DENSE, MOE, D, V, block, mod

pytestmark = pytest.mark.usefixtures("unchecked")

FIRST = 0
LENGTHS = (1, 5, 16, 17, 31, 32, 63, 100)


def model_of(blocks, seq_len=16):
    """A model in fp64 whose running state has seen a batch, and whose predictors pick some tokens."""
    blocks = BLOCKS[blocks] if isinstance(blocks, str) else blocks
    model = build_model({"d_model": D, "vocab_size": V, "seq_len": seq_len, "blocks": blocks}).double().train()
    update(model, model(torch.randint(V, (4, seq_len))).aux.stats)
    for name, parameter in model.named_parameters():
        if name.endswith("predictor.down.weight"):
            parameter.data *= 40
    return model


def documents(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, V, n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 8), (16, 5), (16, 1), (7, 3), (1, 1), (200, 100)])
def test_every_token_is_scored_once_in_a_window_that_is_full_after_the_first(length, context, stride):
    scored = []
    rows = list(windows(0, length, context, stride))
    for i, row in enumerate(rows):
        assert row.end - row.begin == min(context, length)
        assert row.begin <= row.scored < row.end
        assert row.end - row.scored <= (context if i == 0 else stride)
        assert row.last == (row.end == length) == (row is rows[-1])
        scored += range(row.scored, row.end)
    assert scored == list(range(length))
    assert rows[0].scored == 0 and rows[0].end == min(context, length)


def test_the_context_is_at_least_what_the_stride_leaves():
    for stride in (1, 5, 8):
        for row in list(windows(0, 63, 16, stride))[1:]:
            assert row.scored - row.begin >= 16 - stride


@pytest.mark.parametrize("kind", ["dense", "mod", "nested"])
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 7), (9, 4)])
def test_losses_are_those_of_a_loop_over_tokens_with_their_context_cut_out(kind, context, stride):
    model, ids = model_of(kind).eval(), documents((3, 16, 41))
    found = score(model, ids, FIRST, context, stride)
    for doc, own in enumerate(ids):
        tokens, total, end = torch.from_numpy(np.append(FIRST, own).astype(np.int64)), 0.0, 0
        for p in range(len(own)):
            if p >= end:
                end = min(len(own), end + (stride if end else context))
            # Each token alone: nothing after it exists, nor anything before its window.
            with torch.no_grad():
                logits = model(tokens[None, max(0, end - context) : p + 1], Ctx(causal=True)).logits
            total -= float(logits[0, -1].log_softmax(-1)[tokens[p + 1]])
        assert found.nats[doc] == pytest.approx(total, rel=1e-11)
    assert found.tokens.tolist() == [len(own) for own in ids]


@pytest.mark.parametrize("kind", ["dense", "moe", "peer", "expert_choice", "mod", "nested_threshold"])
def test_results_depend_neither_on_the_batch_size_nor_on_other_documents(kind):
    model, ids = model_of(kind), documents()
    word_from = [len(own) - 1 for own in ids]
    alone, many = (score(model, ids, FIRST, 16, 6, word_from, batch_tokens=n) for n in (1, 300))
    np.testing.assert_allclose(many.nats, alone.nats, rtol=1e-11)
    np.testing.assert_allclose(many.word_nats, alone.word_nats, rtol=1e-11)
    assert many.word_right.tolist() == alone.word_right.tolist()
    assert {name: n.tolist() for name, n in many.routed.items()} == {n: v.tolist() for n, v in alone.routed.items()}
    for doc, own in enumerate(ids):
        np.testing.assert_allclose(score(model, [own], FIRST, 16, 6).nats[0], many.nats[doc], rtol=1e-11)


def test_a_longer_context_is_seen():
    # The control: were the windows blind to what the stride leaves them, both would agree.
    model, ids = model_of("dense"), documents((63,))
    assert abs(score(model, ids, FIRST, 16, 16).nats[0] - score(model, ids, FIRST, 16, 1).nats[0]) > 1e-6


def test_learned_positions_never_go_beyond_the_context():
    blocks = {"d_model": D, "vocab_size": V, "seq_len": 16, "learned_positions": 16, "blocks": BLOCKS["dense"]}
    found = score(build_model(blocks), documents(), FIRST, 16, 5)
    assert np.isfinite(found.nats).all()


def test_the_last_word_is_scored_whole_in_the_last_window():
    model, (ids,) = model_of("dense").eval(), documents((41,))
    # Of windows that end at 16, 29, 41 the word of tokens 27 to 40 begins in the second.
    found = score(model, [ids], FIRST, 16, 13, [27])
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        log_p = model(tokens[None, 24:40], Ctx(causal=True)).logits[0].log_softmax(-1)
    wanted = -float(log_p[2:].gather(1, tokens[27:, None]).sum())
    assert found.word_nats[0] == pytest.approx(wanted, rel=1e-11)


def test_a_last_word_is_right_if_each_of_its_tokens_is_the_likeliest():
    model = model_of("dense").eval()
    tokens = [int(t) for t in documents((9,))[0]]
    with torch.no_grad():
        for _ in range(4):
            tokens.append(int(model(torch.tensor([[FIRST, *tokens]]), Ctx(causal=True)).logits[0, -1].argmax()))
    wrong = [*tokens[:-2], (tokens[-2] + 1) % V, tokens[-1]]
    ids = [np.array(t, np.int32) for t in (tokens, wrong, [*tokens[:9], 1, *tokens[10:]])]
    assert score(model, ids, FIRST, 16, 8, [9, 9, 10]).word_right.tolist()[:2] == [True, False]


def test_routed_counts_the_scored_tokens_that_reach_each_layer():
    inner = mod({"kind": "block", "mixer": ATTENTION, "ffn": MOE}, capacity=0.5)
    model, ids = model_of([block(DENSE), mod(inner, capacity=0.5)]), documents((5, 40, 23))
    found = score(model, ids, FIRST, 16, 5)
    outer, nested = found.routed["blocks.1"], found.routed["blocks.1.inner"]
    assert outer[1] == 68 and 0 < outer[0] < 68
    assert nested[1] == outer[0]
    assert not score(model_of("dense"), ids, FIRST, 16, 5).routed


def test_evaluation_leaves_the_model_in_its_mode():
    for training in (True, False):
        model = model_of("threshold").train(training)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        score(model, documents((20,)), FIRST, 16, 5)
        assert model.training == training
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_look_ahead_losses_are_those_of_the_routing_of_training():
    model, (ids,) = model_of("expert_choice"), documents((16,))
    ahead, causal = (score(model, [ids], FIRST, 16, 8, causal=rule).nats[0] for rule in (False, True))
    tokens = torch.from_numpy(np.append(FIRST, ids).astype(np.int64))
    with torch.no_grad():
        log_p = model.train()(tokens[None, :-1], Ctx(causal=False)).logits[0].log_softmax(-1)
    assert ahead == pytest.approx(-float(log_p.gather(1, tokens[1:, None]).sum()), rel=1e-11)
    # The control: here the rules route differently.
    assert abs(ahead - causal) > 1e-6
