from itertools import pairwise

import numpy as np
import pytest
import torch

import tiny
from sparsemix import build_model
from sparsemix.evaluate.perplexity import document_losses, evaluating, flops_spent, has_running_state, reestimate
from sparsemix.layers import Ctx, update
from sparsemix.layers.query_norm import QueryBatchNorm
from sparsemix.model import ModelConfig, token_nats
from tiny import ATTENTION, BLOCKS, MOE, D, T, V, block, mod, prepared

pytestmark = pytest.mark.usefixtures("unchecked")

KINDS = [*tiny.KINDS, "threshold", "nested", "nested_threshold"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus"))[1]


def config_of(blocks):
    blocks = BLOCKS[blocks] if isinstance(blocks, str) else blocks
    return ModelConfig.model_validate({"d_model": D, "vocab_size": V, "seq_len": T, "blocks": blocks})


def model_of(kind, shards):
    """In fp64, its running state observed once, its predictor apart from the fence so that it picks some tokens."""
    model = build_model(config_of(kind)).double().train()
    batch = shards.batch(0, 4, T, seed=0)
    update(model, model(batch.tokens, Ctx(batch.positions, batch.doc_ids)).aux.stats)
    for name, parameter in model.named_parameters():
        if name.endswith("predictor.down.weight"):
            parameter.data *= 20
    return model


def batches(shards, batch_size=3, max_tokens=200):
    return list(shards.eval_batches("test", batch_size, T, max_tokens))


@pytest.mark.parametrize("max_tokens", [160, None])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_parts_are_those_of_each_stretch_of_a_window_on_its_own(shards, kind, max_tokens):
    model = model_of(kind, shards)
    tokens, parts = shards.tokens("test"), shards.parts("test", T, max_tokens)
    losses = document_losses(model, batches(shards, max_tokens=max_tokens))
    places = [(part, at) for part in range(len(parts.starts)) for at in range(parts.starts[part], parts.ends[part])]
    expected = dict.fromkeys(range(len(parts.starts)), 0.0)
    for window in range(0, len(places), T):
        row = places[window : window + T]
        # A stretch ends where the next place is not the next token of the same document.
        breaks = (i for i in range(1, len(row)) if row[i][1] != row[i - 1][1] + 1 or tokens[row[i][1]] == 0)
        cuts = [0, *breaks, len(row)]
        for first, last in pairwise(cuts):
            piece = torch.from_numpy(tokens[row[first][1] : row[last - 1][1] + 2].astype(np.int64))[None]
            with evaluating(model):
                nats = -model(piece[:, :-1], Ctx(causal=True)).logits.log_softmax(-1).gather(2, piece[:, 1:, None])
            for (part, _), value in zip(row[first:last], nats.flatten().tolist(), strict=True):
                expected[part] += value
    assert len(expected) >= 2 and losses.tokens == len(places) == parts.tokens
    assert max_tokens is None or losses.tokens < len(tokens) - 1
    assert losses.nats == pytest.approx(expected, rel=1e-11)


def test_the_sum_over_documents_is_the_sum_over_tokens(shards):
    model = model_of("moe", shards)
    losses = document_losses(model, batches(shards))
    with evaluating(model):
        nats = [
            token_nats(model(b.tokens, Ctx(b.positions, b.doc_ids, b.valid, True)).logits, b.targets)
            for b in batches(shards)
        ]
    assert losses.total == pytest.approx(sum(float(n.sum()) for n in nats), rel=1e-12)
    assert losses.tokens == sum(int((b.targets != -100).sum()) for b in batches(shards))
    assert losses.bits_per_byte(100) == pytest.approx(losses.total / np.log(2) / 100, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_causal_losses_depend_neither_on_the_batch_size_nor_on_other_rows(shards, kind):
    model = model_of(kind, shards)
    alone, others = (document_losses(model, batches(shards, size)) for size in (1, 7))
    assert others.nats == pytest.approx(alone.nats, rel=1e-11)
    for name, value in alone.stats.items():
        np.testing.assert_allclose(others.stats[name], value, rtol=1e-11, atol=1e-12)
    if alone.passes is not None:
        np.testing.assert_array_equal(others.passes, alone.passes)


@pytest.mark.parametrize("kind", KINDS)
def test_look_ahead_changes_the_losses_of_the_kinds_that_look_ahead_and_no_others(shards, kind):
    model = model_of(kind, shards)
    causal, ahead = (document_losses(model, batches(shards), causal) for causal in (True, False))
    if kind in ("dense", "moe", "mh_moe"):
        assert ahead.nats == causal.nats
    else:
        assert abs(ahead.total - causal.total) > 1e-6 * causal.total


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(shards, training):
    model = model_of("nested_threshold", shards).train(training)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    document_losses(model, batches(shards))
    assert model.training == training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("kind", ["peer", "nested"])
def test_reestimated_query_statistics_are_the_mean_of_the_batches_own(shards, kind):
    model = model_of(kind, shards)
    (norm,) = (m for m in model.modules() if isinstance(m, QueryBatchNorm))
    sample = [shards.batch(4 * i, 4, T, seed=3) for i in range(3)]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    queries = []
    handle = norm.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    reestimate(model, sample)
    handle.remove()
    assert len(queries) == 3 and int(norm.num_updates) == 1
    torch.testing.assert_close(norm.mean, torch.stack([q.mean(0) for q in queries]).mean(0), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        norm.square, torch.stack([(q**2).mean(0) for q in queries]).mean(0), rtol=1e-11, atol=1e-11
    )
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_reestimated_threshold_is_the_mean_of_the_batches_quantiles(shards):
    model = model_of("threshold", shards)
    sample = [shards.batch(4 * i, 4, T, seed=3) for i in range(3)]
    with torch.no_grad():
        model.train()
        quantiles = [
            model(b.tokens, Ctx(b.positions, b.doc_ids)).aux.stats["blocks.1.threshold.quantile"] for b in sample
        ]
    assert float(model.blocks[1].threshold.threshold) != pytest.approx(float(sum(quantiles)) / 3, rel=1e-6)
    reestimate(model, iter(sample))
    assert float(model.blocks[1].threshold.threshold) == pytest.approx(float(sum(quantiles)) / 3, rel=1e-11)


@pytest.mark.parametrize("kind", ["dense", "moe", "mh_moe"])
def test_a_model_without_running_state_is_not_touched(shards, kind):
    model = model_of(kind, shards).eval()

    def unread():
        raise AssertionError("a batch was read")
        yield

    assert not has_running_state(model)
    reestimate(model, unread())
    assert not model.training


def test_reestimating_a_predictor_changes_nothing(shards):
    model = model_of("mod", shards)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    reestimate(model, batches(shards))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("kind", ["dense", "moe", "mh_moe", "peer"])
def test_flops_spent_are_the_analytic_cost_where_routing_does_not_decide_it(shards, kind):
    model = model_of(kind, shards).float()
    assert flops_spent(model, batches(shards)) == pytest.approx(config_of(kind).cost().flops / T, rel=1e-12)


def test_flops_spent_with_mod_lie_between_skipping_all_and_routing_all(shards):
    model, config = model_of("mod", shards).float(), config_of("mod")
    # Padding is never routed.
    full = [batch for batch in batches(shards) if batch.valid is None]
    spent = flops_spent(model, full)
    routed_all = config_of([BLOCKS["mod"][0], mod(block(BLOCKS["dense"][1]["ffn"]), capacity=1.0)]).cost().flops / T
    inner = config.blocks[1].inner.cost(D, T).flops / T
    assert routed_all - inner < spent < routed_all
    bias = model.blocks[1].predictor.down.bias.data
    for value, expected in ((-1e4, routed_all - inner), (1e4, routed_all)):
        bias.fill_(value)
        assert flops_spent(model, full) == pytest.approx(expected, rel=1e-12)


def test_flops_spent_with_noops_are_those_of_the_real_experts_that_ran(shards):
    model, sample = model_of("mode", shards).float(), batches(shards)
    losses, tokens = document_losses(model, sample), sum(batch.tokens.numel() for batch in sample)
    cost = config_of("mode").cost()
    fixed, row = (cost.flops - cost.items["experts"]) / T, 2 * 3 * D * 20
    runs = sum(losses.stats[f"blocks.{i}.ffn.counts"].sum() for i in range(2))
    assert flops_spent(model, sample) == pytest.approx(fixed + row * runs / tokens, rel=1e-6)


def test_taken_counts_every_scored_token_once(shards):
    losses = document_losses(model_of("mode", shards), batches(shards))
    for i in range(2):
        taken = losses.stats[f"blocks.{i}.ffn.taken"]
        assert taken.sum() == losses.tokens
        assert (taken * np.arange(5)).sum() == losses.stats[f"blocks.{i}.ffn.counts"].sum() > 0


def test_reestimating_an_experts_threshold_starts_anew_and_a_bias_goes_on(shards):
    model = model_of("nested", shards)
    choice, bias = model.blocks[2].ffn.threshold, model.blocks[0].ffn.bias
    sample, before = [shards.batch(4 * i, 4, T, seed=3) for i in range(3)], bias.clone()
    with torch.no_grad():
        model.train()
        stats = [model(b.tokens, Ctx(b.positions, b.doc_ids)).aux.stats for b in sample]
    reestimate(model, sample)
    wanted = sum(s["blocks.2.ffn.threshold.quantile"] for s in stats) / 3
    torch.testing.assert_close(choice.threshold, wanted, rtol=1e-11, atol=0)
    load = sum(s["blocks.0.ffn.load"] for s in stats)
    torch.testing.assert_close(bias, before + 0.01 * (load.mean() - load).sign(), rtol=0, atol=1e-12)


def test_passes_and_confusion_count_every_scored_token_once(shards):
    two = [mod({"kind": "block", "mixer": ATTENTION, "ffn": MOE}, capacity=c) for c in (0.25, 0.5)]
    model = model_of(two, shards)
    losses = document_losses(model, batches(shards))
    assert losses.passes is not None and len(losses.passes) == 3 and losses.passes.sum() == losses.tokens
    routed = 0
    for i in range(2):
        confusion = losses.stats[f"blocks.{i}.confusion"]
        assert confusion.sum() == losses.tokens
        # The picks of the inner experts are those of the tokens that the predictor let through: 2 each.
        assert losses.stats[f"blocks.{i}.inner.ffn.counts"].sum() == 2 * confusion[:2].sum()
        routed += confusion[:2].sum()
    assert (losses.passes * np.arange(3)).sum() == routed > 0
