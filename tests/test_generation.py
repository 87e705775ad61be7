"""Is streamed text what the full forward, a plain sampler and the tokenizer say it is?"""

import itertools
import math
import random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from sparsemix.api import build_model
from sparsemix.config import ConfigError, parse
from sparsemix.data.detokenizer import Detokenizer
from sparsemix.data.tokenizer import end_of_text, start_ids, train_tokenizer
from sparsemix.generation import ENDED, Sampling, chances, dense_cache_bytes, draw, generate
from sparsemix.layers import Cache, Ctx, update
from tiny import ATTENTION, BLOCKS, DENSE, MOE, PEER, D, V, block, mod

pytestmark = pytest.mark.usefixtures("unchecked")

GREEDY = Sampling(temperature=0)
DEEP = [block(DENSE), mod(mod(block(PEER), capacity=0.6), capacity=0.5), mod(block(MOE), sampling="router_bce")]


def model_of(blocks):
    """A model in fp64 with running state of one step, whose routers have something to say."""
    model = build_model({"d_model": D, "vocab_size": V, "seq_len": 64, "blocks": blocks}).double().train()
    update(model, model(prompt(40, 3)).aux.stats)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "predictor" in name:
                parameter.mul_(20)
    return model.eval()


def prompt(length, rows=1):
    return torch.randint(V, (rows, length))


def by_full_forward(model, tokens, steps):
    """Greedy text of one row without a cache: the whole row again for every token, and the log-probabilities."""
    logprobs = []
    for _ in range(steps):
        logits = model(tokens[None], Ctx(causal=True)).logits[0, -1]
        tokens = torch.cat([tokens, logits.argmax()[None]])
        logprobs.append(logits.log_softmax(-1).max())
    return tokens[-steps:], torch.stack(logprobs)


@pytest.mark.parametrize("blocks", [*BLOCKS.values(), DEEP], ids=[*BLOCKS, "deep"])
def test_greedy_text_is_that_of_the_full_forward_at_any_split_of_the_prompt(blocks):
    model, tokens = model_of(blocks), prompt(11)
    wanted, logprobs = by_full_forward(model, tokens[0], 7)
    assert len(wanted.unique()) > 1
    for chunk in (1, 4, 512):
        steps = list(generate(model, tokens, 7, GREEDY, chunk=chunk))
        assert torch.cat([step.token_ids for step in steps]).tolist() == wanted.tolist()
        torch.testing.assert_close(torch.cat([step.logprobs for step in steps]), logprobs, rtol=0, atol=1e-11)


def test_the_training_mode_of_a_model_does_not_change_its_text():
    model, tokens = model_of(DEEP), prompt(11)
    texts = []
    for mode in (False, True):
        steps = generate(model.train(mode), tokens, 9, GREEDY)
        texts.append([int(step.token_ids) for step in steps if not step.logprobs.requires_grad])
        assert model.training == mode and torch.is_grad_enabled()
    assert texts[0] == texts[1] and len(texts[0]) == 9


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_gets_the_text_that_it_gets_alone(side):
    model, lengths = model_of(DEEP), [7, 1, 4]
    several = [prompt(n)[0] for n in lengths]
    tokens, valid = prompt(7, 3), torch.zeros(3, 7, dtype=torch.bool)
    for b, row in enumerate(several):
        place = slice(7 - len(row), 7) if side == "left" else slice(0, len(row))
        tokens[b, place], valid[b, place] = row, True
    alone = [by_full_forward(model, row, 6)[0].tolist() for row in several]
    # The second row's third token ends it; the others go on.
    stop = alone[1][2]
    wanted = [row[: row.index(stop) + 1] if stop in row else row for row in alone]
    assert any(stop not in row for row in wanted), "a row must outlive another"
    cache = Cache(3)
    for chunk in (3, 512):
        cache = Cache(3)
        steps = list(generate(model, tokens, 6, GREEDY, stop=[stop], valid=valid, chunk=chunk, cache=cache))
        got = torch.stack([step.token_ids for step in steps], 1).tolist()
        assert [[t for t in row if t != ENDED] for row in got] == wanted
        assert all(float(s.logprobs[b]) == 0 for s in steps for b in range(3) if s.token_ids[b] == ENDED)
    # What is drawn last is not read; an ended row reads no more.
    assert cache.seen.tolist() == [n + len(row) - 1 for n, row in zip(lengths, wanted, strict=True)]


def test_what_was_read_is_the_prompt_then_each_token_with_its_routing():
    model, tokens = model_of(DEEP), prompt(5)
    steps = list(generate(model, tokens, 4, GREEDY, chunk=3, picks=True))
    assert [read.tokens.shape[1] for read in steps[0].read] == [3, 2]
    assert torch.equal(torch.cat([read.tokens for read in steps[0].read], 1), tokens)
    for before, step in itertools.pairwise(steps):
        (read,) = step.read
        assert read.tokens.flatten().tolist() == before.token_ids.tolist()
    whole = torch.cat([tokens, torch.stack([s.token_ids for s in steps[:-1]], 1)], 1)
    wanted = model(whole, Ctx(causal=True)).aux.stats
    reads = [read for step in steps for read in step.read]
    for name in ("blocks.1.routed", "blocks.2.routed", "blocks.1.scores", "blocks.1.guess"):
        got = torch.cat([read.stats[name] for read in reads], 1)
        torch.testing.assert_close(got, wanted[name], rtol=0, atol=1e-11)
    assert 0 < int(wanted["blocks.1.routed"].sum()) < whole.numel()
    assert any("blocks.2.inner.ffn.expert_ids" in read.stats for read in reads)
    silent = next(generate(model, tokens, 1, GREEDY)).read[0].stats
    assert not any(name.endswith("expert_ids") for name in silent)


@pytest.mark.parametrize("name", ["moe", "mh_moe", "peer", "pkm", "expert_choice", "mode"])
def test_the_picks_of_decoding_are_those_of_the_full_forward_and_sum_to_the_counts(name):
    model, tokens = model_of(BLOCKS[name]), prompt(9)
    whole = model(tokens, Ctx(causal=True, picks=True)).aux.stats
    (path,) = {key.removesuffix(".expert_ids") for key in whole if key.startswith("blocks.1") and "expert_ids" in key}
    ids = whole[f"{path}.expert_ids"]
    counts = torch.bincount(ids[ids >= 0], minlength=len(whole[f"{path}.counts"]))
    assert counts.tolist() == whole[f"{path}.counts"].tolist()
    cache, parts = Cache(1), []
    for t in range(9):
        ctx = Ctx(causal=True, cache=cache, picks=True)
        parts.append(model(tokens[:, t : t + 1], ctx).aux.stats)
    assert torch.equal(torch.cat([part[f"{path}.expert_ids"] for part in parts]), ids)
    torch.testing.assert_close(torch.cat([part[f"{path}.gates"] for part in parts]), whole[f"{path}.gates"])


def kept_by_a_loop(logits, sampling):
    """Probabilities of one row as the settings say it, token by token."""
    weights = {v: math.exp((x - max(logits)) / sampling.temperature) for v, x in enumerate(logits)}
    likeliest = sorted(weights, key=lambda v: (-weights[v], v))[: sampling.top_k]
    total = sum(weights[v] for v in likeliest)
    kept, mass = [], 0.0
    for v in likeliest:
        if mass >= sampling.top_p:
            break
        kept.append(v)
        mass += weights[v] / total
    total = sum(weights[v] for v in kept)
    return [weights[v] / total if v in kept else 0.0 for v in range(len(logits))]


@pytest.mark.parametrize("top_p", [1.0, 0.83, 0.31, 1e-9])
@pytest.mark.parametrize("top_k", [None, 1, 6, 99])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 1e-300])
def test_the_chances_are_those_of_a_plain_loop(temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = 3 * torch.randn(3, 23, dtype=torch.float64)
    wanted = torch.tensor([kept_by_a_loop(row, sampling) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(chances(logits, sampling), wanted, rtol=0, atol=1e-11)


def test_tokens_are_drawn_as_often_as_their_chances_say():
    logits, sampling = torch.randn(1, 7, dtype=torch.float64), Sampling(temperature=0.8, top_p=0.9)
    probs, draws = chances(logits, sampling)[0], 20_000
    drawn = draw(logits.expand(draws, 7), sampling, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=7) / draws
    assert ((share - probs).abs() <= 4 * (probs * (1 - probs) / draws).sqrt()).all()
    assert (share[probs == 0] == 0).all() and int((probs == 0).sum()) > 0


def test_a_seed_gives_its_text_again_and_another_seed_another():
    model, tokens = model_of(BLOCKS["mod"]), prompt(5)
    state = torch.random.get_rng_state()
    texts = [[int(step.token_ids) for step in generate(model, tokens, 12, Sampling(seed=seed))] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not ours to move"


def test_a_stop_token_is_the_last_and_without_it_the_limit_is():
    model, tokens = model_of(BLOCKS["dense"]), prompt(5)
    free = [int(step.token_ids) for step in generate(model, tokens, 9, GREEDY)]
    stop = free[4]
    stopped = [int(step.token_ids) for step in generate(model, tokens, 9, GREEDY, stop=[stop])]
    assert len(free) == 9 and stopped == free[: free.index(stop) + 1]
    assert list(generate(model, tokens, 0, GREEDY)) == []


@pytest.mark.usefixtures("checked")
def test_a_dense_models_cache_is_what_a_routed_one_is_measured_against():
    model, cache = model_of([*BLOCKS["dense"], mod(block(DENSE), selector="strided")]), Cache(1)
    list(generate(model, prompt(5), 8, GREEDY, cache=cache))
    per_token = 2 * D * 8
    assert dense_cache_bytes(model, cache) == 3 * 12 * per_token
    assert cache.bytes() == (2 * 12 + 3) * per_token


def test_prompts_and_settings_that_cannot_be_are_refused():
    model = model_of([ATTENTION])
    with pytest.raises(ConfigError, match="the prompt is empty"):
        next(generate(model, prompt(0), 1))
    with pytest.raises(ConfigError, match="every row needs at least one token"):
        next(generate(model, prompt(2, 2), 1, valid=torch.tensor([[True, True], [False, False]])))
    with pytest.raises(ConfigError, match="chunk=0 must be at least 1"):
        next(generate(model, prompt(2), 1, chunk=0))
    for name, value in (("temperature", -0.1), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.01)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            parse(Sampling, {name: value})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sees the dog. ", "naïve café, größer"] * 9, 300)


def streamed(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(i) for i in ids), detokenizer.rest()]


TEXT = "the cat sees 猫 and 👩‍🚀 at the naïve café: größer, 𝄞!\n\tthe dog. "


def test_streamed_text_is_the_text_and_never_a_broken_character(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert any(len(tokenizer.decode([i]).strip("\ufffd")) == 0 for i in ids), "some tokens are parts of a character"
    assert sum(bool(piece) for piece in pieces) > 20, "text comes as it is completed"


def test_bytes_that_are_no_text_are_marked_once_and_hold_nothing_up(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(300) for _ in range(rng.randrange(1, 20))]
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        shown = ""
        for i, piece in enumerate(pieces):
            shown += piece
            assert len(tokenizer.decode(ids[: i + 1])) - len(shown) <= 1
    cut = tokenizer.encode("猫", add_special_tokens=False).ids[:-1]
    assert streamed(tokenizer, cut) == [""] * len(cut) + ["\ufffd"]


def test_a_prompt_starts_as_a_training_document_or_as_the_tokenizer_says(tokenizer):
    assert start_ids(tokenizer) == [end_of_text(tokenizer)]
    own = Tokenizer.from_str(tokenizer.to_str())
    own.post_processor = TemplateProcessing(single="b $A e", special_tokens=[("b", 7), ("e", 9)])
    assert start_ids(own) == [7]
