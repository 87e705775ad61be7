"""transformers' own `generate` with ragged caches gives what no cache gives, and every sequence what it gets alone."""

import pytest
import torch
from hf_models import LENGTHS, MODELS, hf_model, padded, sequences

from sparsemix.interop.hf import SparsemixCache
from sparsemix.interop.hf_model import CACHE
from sparsemix.layers import Ctx
from tiny import T, V

pytestmark = pytest.mark.usefixtures("unchecked")


NEW = 6
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
}


def generated(model, ids, mask=None, new=NEW, **ways):
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    defaults = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new}
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **defaults | ways)


def assert_equal(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_changes_nothing(name, way):
    model, (ids, mask) = hf_model(name), padded(sequences())
    cached, plain = (generated(model, ids, mask, use_cache=use, **WAYS[way]) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert isinstance(cached[CACHE], SparsemixCache)


@pytest.mark.parametrize("name", MODELS)
def test_a_left_padded_batch_is_every_sequence_alone(name):
    model, several = hf_model(name), sequences()
    ids, mask = padded(several)
    batch = generated(model, ids, mask, output_logits=True)
    for b, sequence in enumerate(several):
        alone = generated(model, sequence[None], output_logits=True, use_cache=False)
        assert torch.equal(batch.sequences[b, -NEW:], alone.sequences[0, -NEW:])
        assert_equal(torch.stack(batch.logits)[:, b], torch.stack(alone.logits)[:, 0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_on_either_side_changes_no_logits(name, side):
    model, several = hf_model(name), sequences()
    ids, mask = padded(several, side)
    for use_cache in (True, False):
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
        for b, sequence in enumerate(several):
            assert_equal(logits[b, mask[b].bool()], model(sequence[None], use_cache=False).logits[0])


@pytest.mark.parametrize("name", ["mod", "threshold", "nested", "mod_mode"])
def test_the_top_k_of_training_would_be_another_model(name):
    """The control: what evaluation would give if it routed as training does."""
    model, ids = hf_model(name), torch.randint(V, (2, T))
    with torch.no_grad():
        control = model.model(ids, Ctx(causal=False)).logits
        assert (model(ids).logits - control).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dense", "nested", "mod_mode"])
def test_a_second_turn_goes_on_from_the_returned_cache(name):
    model, (ids, mask) = hf_model(name), padded(sequences())
    first = generated(model, ids, mask)
    said = torch.cat([first.sequences, torch.randint(1, V, (len(LENGTHS), 4))], dim=1)
    longer = torch.cat([mask, torch.ones(len(LENGTHS), NEW + 4, dtype=torch.long)], dim=1)
    again = generated(model, said, longer, **{CACHE: first[CACHE]})
    assert torch.equal(again.sequences, generated(model, said, longer, use_cache=False).sequences)


@pytest.mark.parametrize("name", ["dense", "mod", "nested", "mod_mode"])
def test_rejected_drafts_leave_no_trace(name):
    model, ids = hf_model(name), torch.randint(1, V, (1, 4)).repeat(1, 3)
    wanted = generated(model, ids, new=9, use_cache=False).sequences
    looked_up = generated(model, ids, new=9, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up.sequences, wanted)
    assisted = generated(model, ids, new=9, assistant_model=hf_model("dense", seed=1))
    assert torch.equal(assisted.sequences, wanted)


@pytest.mark.parametrize("name", ["dense", "nested", "mod_mode"])
def test_a_prompt_in_chunks_is_the_prompt(name):
    model, (ids, mask) = hf_model(name), padded(sequences())
    chunked = generated(model, ids, mask, prefill_chunk_size=4)
    assert torch.equal(chunked.sequences, generated(model, ids, mask).sequences)


def test_rows_are_selected_repeated_and_forgotten():
    model, (ids, mask) = hf_model("nested"), padded(sequences())
    wanted = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]

    def last(cache, rows, columns):
        out = model(ids[rows][:, columns:], attention_mask=mask[rows], **{CACHE: cache})
        assert_equal(out.logits[:, -1], wanted[rows])

    cache = model(ids[:, :-2], attention_mask=mask[:, :-2])[CACHE]
    assert cache.get_seq_length() == len(ids[0]) - 2 and cache.batch_size == len(ids) and cache.is_initialized
    cache.batch_select_indices(torch.tensor([2, 0, 3]))
    cache.batch_repeat_interleave(2)
    last(cache, torch.tensor([2, 2, 0, 0, 3, 3]), -2)
    cache.crop(-2)
    cache.crop(0)
    last(cache, torch.tensor([2, 2, 0, 0, 3, 3]), -2)
    # As transformers before 5.24 asks: how many columns to keep.
    cache.crop(len(ids[0]) - 2)
    last(cache, torch.tensor([2, 2, 0, 0, 3, 3]), -2)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1 and len(cache) == 0
    last(cache, torch.arange(4), 0)


def test_a_cache_that_cannot_serve_is_refused():
    from transformers import DynamicCache

    model, (ids, mask) = hf_model("mod"), padded(sequences())
    with pytest.raises(ValueError, match="DynamicCache cannot hold ragged routed layers"):
        model(ids, **{CACHE: DynamicCache()})
    with pytest.raises(ValueError, match="cache_implementation='static' cannot hold"):
        generated(model, ids, mask, cache_implementation="static")
    cache = model(ids, attention_mask=mask)[CACHE]
    with pytest.raises(ValueError, match="holds 4 sequences, not 1"):
        model(ids[:1], **{CACHE: cache})
    with pytest.raises(ValueError, match="differs from the one that the cached tokens came with"):
        model(ids[:, :2], attention_mask=torch.ones(4, ids.shape[1] + 2), **{CACHE: cache})


def test_a_layer_that_was_never_observed_says_so():
    from hf_models import settings

    from sparsemix.interop.hf import SparsemixConfig, SparsemixForCausalLM

    for name, told in {"threshold": "thresholds were never observed", "peer": "statistics were never observed"}.items():
        model = SparsemixForCausalLM(SparsemixConfig(settings=settings(name))).eval()
        with pytest.raises(RuntimeError, match=told):
            model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1, pad_token_id=0)
