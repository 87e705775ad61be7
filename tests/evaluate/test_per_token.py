"""Do statistics of single tokens come back to the tokens they are about?"""

import numpy as np
import pytest
import torch

from sparsemix import build_model
from sparsemix.evaluate.per_token import on_tokens
from sparsemix.evaluate.perplexity import document_losses, prediction_entropy
from sparsemix.layers import Ctx, update
from sparsemix.model import ModelConfig
from tiny import BLOCKS, MH_MOE, MOE, PEER, D, T, V, block, mod, prepared


def filled(values, mask):
    """The values of kept tokens, each row's first, as a layer inside Mixture-of-Depths has them; 99 is filling."""
    rows = [[values[b][t] for t in range(mask.shape[1]) if mask[b, t]] for b in range(len(mask)) if mask[b].any()]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [99.0] * (width - len(row)) for row in rows])


def test_values_of_routed_tokens_return_to_their_places_through_two_levels():
    outer = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
    inner = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
    number = torch.arange(15.0).view(3, 5)
    stats = {
        "a.routed": outer,
        "a.scores": number,
        "a.inner.routed": filled(inner.float().tolist(), outer) == 1,
        "a.inner.scores": filled(number.tolist(), outer),
        "a.inner.inner.ffn.top_gate": filled(number.tolist(), inner).flatten(),
    }
    found, rows_per_token = on_tokens(stats, torch.Size((3, 5)))
    nan = torch.tensor(torch.nan)
    expected = {
        "a.routed": outer.float(),
        "a.scores": number,
        "a.inner.routed": torch.where(outer, inner.float(), nan),
        "a.inner.scores": torch.where(outer, number, nan),
        "a.inner.inner.ffn.top_gate": torch.where(inner, number, nan),
    }
    assert set(found) == set(expected) and set(rows_per_token.values()) == {1}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, equal_nan=True)


def test_a_token_of_several_sub_tokens_has_their_mean():
    found, rows_per_token = on_tokens({"ffn.inner.top_gate": torch.arange(12.0)}, torch.Size((2, 2)))
    assert found["ffn.inner.top_gate"].tolist() == [[1.0, 4.0], [7.0, 10.0]]
    assert rows_per_token == {"ffn.inner.top_gate": 3}


def test_rows_that_are_no_multiple_of_the_tokens_are_left_out():
    assert on_tokens({"ffn.top_gate": torch.ones(7)}, torch.Size((2, 2))) == ({}, {})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus"))[1]


def series_of(blocks, shards, batch_size):
    config = {"d_model": D, "vocab_size": V, "seq_len": T, "blocks": blocks}
    model = build_model(ModelConfig.model_validate(config)).double().train()
    batch = shards.batch(0, 4, T, seed=0)
    update(model, model(batch.tokens, Ctx(batch.positions, batch.doc_ids)).aux.stats)
    for name, parameter in model.named_parameters():
        if name.endswith("predictor.down.weight"):
            parameter.data *= 20
    losses = document_losses(model, shards.eval_batches("test", batch_size, T, 200), per_token=True)
    return losses, losses.series()


DEEP = [mod(mod(block(MH_MOE), capacity=0.5), capacity=0.5), block(PEER), mod(block(MOE), sampling="threshold")]


@pytest.mark.parametrize("blocks", [BLOCKS["moe"], BLOCKS["mh_moe"], BLOCKS["nested"], DEEP])
def test_a_tokens_statistics_depend_neither_on_the_batch_size_nor_on_other_rows(shards, blocks):
    (_, alone), (_, others) = (series_of(blocks, shards, size) for size in (1, 7))
    assert set(alone) == set(others) and any(name.endswith("top_gate") for name in alone)
    for name, value in alone.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
        assert np.isfinite(value).any() and len(np.unique(value[np.isfinite(value)])) > 1


def test_the_series_sum_to_the_losses_and_depth_counts_the_layers(shards):
    losses, series = series_of(DEEP, shards, 3)
    assert len(series["nats"]) == losses.tokens
    assert series["nats"].sum() == pytest.approx(losses.total, rel=1e-11)
    masks = [series[f"blocks.{path}.routed"] for path in ("0", "0.inner", "2")]
    np.testing.assert_array_equal(series["depth"], sum(np.nan_to_num(mask) for mask in masks))
    np.testing.assert_array_equal(np.bincount(series["depth"].astype(int), minlength=4), losses.passes)
    # A layer inside sees what its wrapper routed, no token more.
    np.testing.assert_array_equal(np.isnan(masks[1]), masks[0] == 0)
    np.testing.assert_array_equal(np.isnan(series["blocks.0.inner.inner.ffn.inner.top_gate"]), masks[1] != 1)


def test_without_being_asked_for_no_series_is_kept(shards):
    config = {"d_model": D, "vocab_size": V, "seq_len": T, "blocks": BLOCKS["mod"]}
    losses = document_losses(build_model(config), shards.eval_batches("test", 3, T, 200))
    assert losses.series() == {} and losses.passes is not None


def test_the_entropy_of_even_logits_is_ln_v_and_of_certain_ones_zero():
    logits = torch.zeros(1, 2, 7, dtype=torch.float64)
    logits[0, 1, 3] = 1e4
    assert prediction_entropy(logits)[0].tolist() == pytest.approx([np.log(7), 0.0], abs=1e-12)
