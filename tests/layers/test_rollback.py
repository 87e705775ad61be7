"""Taking tokens back, splitting and mixing batches in any way: the same logits as every text alone, and its bytes."""

import random
from functools import lru_cache

import pytest
import torch
from test_causality import (
    ATTENTION,
    COMPARING,
    DENSE,
    MH_MOE,
    MODE,
    MOE,
    TERNARY,
    V,
    block,
    mod,
    model_of,
    observed_model,
)
from test_decoding import alone, assert_equal, counted, in_chunks

from sparsemix.layers import Cache, Ctx
from sparsemix.layers.cache import Held

pytestmark = pytest.mark.usefixtures("unchecked")

NESTS = {
    "attention": block(DENSE),
    "mod": mod(block(DENSE)),
    "mod_in_mod": mod(mod(block(DENSE)), capacity=0.7),
    "mod_everywhere": mod(block(mod(MOE), mixer=mod(ATTENTION)), capacity=0.6),
    "mod_threshold_of_mode": mod(block(MODE | {"routing": "expert_choice"}), sampling="threshold"),
    "mod_in_heads": block(mod(MH_MOE), mixer=mod(ATTENTION)),
    "mod_of_ternary": mod(block(DENSE | TERNARY, mixer=ATTENTION | TERNARY)),
    "mod_window": mod(block(DENSE, mixer=ATTENTION | {"window": 4})),
}
each_nest = pytest.mark.parametrize("name", NESTS)


@lru_cache
def nest(name):
    """The model around it; what it observed is the same in every order of tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return observed_model(NESTS[name]).eval()


def step(model, tokens, cache, **ctx):
    return model(tokens, Ctx(causal=True, cache=cache, **ctx)).logits


def random_batch(rng, rows=3, longest=17):
    """Texts of mixed lengths."""
    return [torch.randint(V, (rng.randrange(2, longest),)) for _ in range(rows)]


def pour(model, several, rng, cache):
    """Every row's logits, each call bringing any number of tokens to any rows, with filling anywhere."""
    done, parts = [0] * len(several), [[] for _ in several]
    while any(at < len(text) for at, text in zip(done, several, strict=True)):
        left = [len(text) - at for at, text in zip(done, several, strict=True)]
        counts = [rng.randrange(min(6, n) + 1) for n in left]
        T = max(1, *counts) + rng.randrange(2)
        tokens, valid = torch.randint(V, (len(several), T)), torch.zeros(len(several), T, dtype=torch.bool)
        for b, (text, n) in enumerate(zip(several, counts, strict=True)):
            places = sorted(rng.sample(range(T), n))
            tokens[b, places], valid[b, places] = text[done[b] : done[b] + n], True
            done[b] += n
        logits = step(model, tokens, cache, valid=valid)
        for b in range(len(several)):
            parts[b].append(logits[b, valid[b]])
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("seed", range(2))
@each_nest
def test_any_split_of_a_mixed_batch_with_filling_anywhere_is_every_text_alone(name, seed):
    rng, model = random.Random(seed), nest(name)
    several = random_batch(rng)
    cache = Cache(len(several))
    for text, logits in zip(several, pour(model, several, rng, cache), strict=True):
        assert_equal(logits, alone(model, text))
    assert cache.seen.tolist() == [len(text) for text in several]


@each_nest
def test_every_row_takes_back_its_own_number_of_tokens(name):
    model, rng = nest(name), random.Random(5)
    several = random_batch(rng, 4)
    drafts = [torch.randint(V, (n,)) for n in (3, 0, 6, 1)]
    cache = Cache(4)
    before = pour(model, several, rng, cache)
    pour(model, drafts, rng, cache)
    cache.rollback(torch.tensor([len(draft) for draft in drafts]))
    assert cache.seen.tolist() == [len(text) for text in several]
    fresh = Cache(4)
    pour(model, several, rng, fresh)
    assert cache.report() == fresh.report()
    following = [torch.randint(V, (5,)) for _ in several]
    after = pour(model, following, rng, cache)
    for text, start, more, logits in zip(several, before, following, after, strict=True):
        assert_equal(torch.cat([start, logits]), alone(model, torch.cat([text, more])))


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (0, 0)])
def test_taking_back_another_number_is_another_text(counts):
    model, texts = nest("mod"), torch.randint(V, (2, 9))
    _, cache = in_chunks(model, torch.cat([texts, torch.randint(V, (2, 3))], dim=1), None, [12])
    cache.rollback(torch.tensor(counts))
    more = torch.randint(V, (2, 4))
    logits = step(model, more, cache)
    wanted = torch.stack([alone(model, torch.cat([text, end]))[9:] for text, end in zip(texts, more, strict=True)])
    apart = (logits - wanted).abs().amax(dim=(1, 2))
    assert [bool(gap > 1e-3) for gap in apart] == [n != 3 for n in counts]


def pick(logits):
    """The second likeliest token: with these weights the likeliest is the one that was read."""
    return logits.topk(2).indices[..., 1]


def greedy(model, prompt, count):
    cache, said, read = Cache(len(prompt)), [], prompt
    for _ in range(count):
        read = pick(step(model, read, cache)[:, -1:])
        said.append(read)
    return torch.cat(said, dim=1)


def speculative(model, drafter, prompt, count, guesses=3, take_back=True):
    """Greedy text of `model`, which reads `guesses` tokens of `drafter` at a time and keeps those it would have said;
    and how many it kept."""
    B = len(prompt)
    # A model that drafts for itself has two caches as well.
    caches = [Cache(B), Cache(B)]
    step(drafter, prompt, caches[1])
    last = pick(step(model, prompt, caches[0])[:, -1:])
    said, kept = [[int(token)] for token in last], 0
    while min(map(len, said)) < count:
        read, drafted = last, []
        for _ in range(guesses + 1):
            read = pick(step(drafter, read, caches[1])[:, -1:])
            drafted.append(read)
        draft = torch.cat(drafted[:guesses], dim=1)
        choice = pick(step(model, torch.cat([last, draft], dim=1), caches[0]))  # (B, guesses + 1)
        right = (choice[:, :-1] == draft).long().cumprod(dim=1).sum(dim=1)  # (B,)
        if take_back:
            for cache in caches:
                cache.rollback(guesses - right)
        for b in range(B):
            said[b] += choice[b, : right[b] + 1].tolist()
        last, kept = choice.gather(1, right[:, None]), kept + int(right.sum())
    return torch.tensor([text[:count] for text in said]), kept


@each_nest
def test_speculative_decoding_says_what_plain_decoding_says(name):
    model, prompt = nest(name), torch.randint(V, (4, 5))
    # Near enough to be right at times, at other times in every row.
    drafter = nest("mod" if name != "mod" else "attention")
    wanted = greedy(model, prompt, 14)
    assert max(len(text.unique()) for text in wanted) > 3, "a text that repeats itself forgives lost tokens"
    for helper in (drafter, model):
        text, kept = speculative(model, helper, prompt, 14)
        assert torch.equal(text, wanted)
        assert kept > 0 or helper is drafter


def test_drafts_that_are_not_taken_back_change_the_text():
    model, prompt = nest("mod"), torch.randint(V, (4, 5))
    text, _ = speculative(model, nest("attention"), prompt, 14, take_back=False)
    assert not torch.equal(text, greedy(model, prompt, 14))


@pytest.mark.usefixtures("checked")
def test_rows_may_step_apart():
    model, texts = nest("mod_in_mod"), torch.randint(V, (4, 11))
    cache, parts = Cache(4), [[] for _ in texts]
    done = torch.zeros(4, dtype=torch.long)
    for rows in ([0, 1, 2, 3], [2], [3, 0], [2], [1, 2, 3], [0]):
        tokens = torch.stack([texts[r, done[r] : done[r] + 2] for r in rows])
        for r, logits in zip(rows, step(model, tokens, cache, rows=torch.tensor(rows)), strict=True):
            parts[r].append(logits)
        done[rows] += 2
    for text, part, n in zip(texts, parts, done.tolist(), strict=True):
        assert_equal(torch.cat(part), alone(model, text[:n]))


@each_nest
def test_rows_that_are_alike_need_no_slots_of_their_own(name):
    model, tokens, every = nest(name), torch.randint(V, (3, 12)), torch.arange(3)
    caches = Cache(3), Cache(3)
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 12)):
        chunk = tokens[:, start:end]
        assert_equal(step(model, chunk, caches[0]), step(model, chunk, caches[1], rows=every))
    assert caches[0].report() == caches[1].report()


def test_documents_stay_apart_in_a_cache():
    model, tokens = nest("mod"), torch.randint(V, (2, 12))
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 8 + [1] * 4])
    wanted = model(tokens, Ctx(doc_ids=ids, causal=True)).logits
    for doc_ids, equal in ((ids, True), (torch.zeros_like(ids), False)):
        cache, parts = Cache(2), []
        for start, end in ((0, 3), (3, 7), (7, 8), (8, 12)):
            parts.append(step(model, tokens[:, start:end], cache, doc_ids=doc_ids[:, start:end]))
        gap = (torch.cat(parts, dim=1) - wanted).abs().max()
        assert (gap <= 1e-11) if equal else (gap > 1e-3)


def test_positions_that_change_in_place_turn_the_next_keys():
    model, tokens = nest("attention"), torch.randint(V, (2, 5))
    cache, positions, parts = Cache(2), torch.zeros(2, 1, dtype=torch.long), []
    for t in range(5):
        parts.append(step(model, tokens[:, t : t + 1], cache, positions=positions))
        positions += 1
    assert_equal(torch.cat(parts, dim=1), model(tokens, Ctx(causal=True)).logits)
    cache.rollback(2)
    assert cache.seen.tolist() == [3, 3]


def test_a_cache_with_positions_of_its_own_cannot_tell_what_came_last():
    model, cache = nest("attention"), Cache(1)
    step(model, torch.randint(V, (1, 4)), cache, positions=torch.tensor([[0, 1, 5, 6]]))
    with pytest.raises(ValueError, match=r"positions of its own cannot be cropped: let positions count on"):
        cache.rollback(1)


@pytest.mark.parametrize("name", COMPARING)
def test_a_prefill_that_compares_tokens_would_be_another_model(name):
    model, tokens = model_of(name).eval(), torch.randint(V, (3, 13))
    logits, _ = in_chunks(model, tokens, None, [6, *range(7, 14)])
    assert_equal(logits, model(tokens, Ctx(causal=True)).logits)
    assert (logits - model(tokens, Ctx(causal=False)).logits).abs().max() > 1e-3


@pytest.mark.usefixtures("checked")
def test_the_report_holds_the_routed_tokens_of_every_layer_beside_the_dense_model():
    model, dense, several = nest("mod"), nest("attention"), random_batch(random.Random(2), 4)
    caches = Cache(4), Cache(4)
    for m, cache in zip((model, dense), caches, strict=True):
        pour(m, several, random.Random(3), cache)
    routed = sum(int(counted(model, "blocks.1", text[None], Ctx(causal=True))) for text in several)
    seen = sum(map(len, several))
    token_bytes = 2 * 8 * 8  # keys and values, fp64, two of four heads: 8 of 16 channels
    assert 0 < routed < seen
    report, whole = caches[0].report(), caches[1].report()
    assert report == {
        "blocks.0.mixer": Held(seen, seen, seen * token_bytes, seen * token_bytes),
        "blocks.1.inner.mixer": Held(routed, seen, routed * token_bytes, seen * token_bytes),
        "blocks.2.mixer": Held(seen, seen, seen * token_bytes, seen * token_bytes),
    }
    assert all(held.bytes == held.dense_bytes for held in whole.values())
    assert sum(held.dense_bytes for held in report.values()) == caches[1].bytes()
    assert caches[0].bytes() / caches[1].bytes() == pytest.approx((2 + routed / seen) / 3)
