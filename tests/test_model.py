import math

import pytest
import torch

from sparsemix.api import build_model
from sparsemix.config import ConfigError, parse
from sparsemix.layers import Cache, Ctx
from sparsemix.model import ModelConfig, token_nats
from sparsemix.patterns import places

BLOCK = {
    "kind": "block",
    "mixer": {"kind": "attention", "num_heads": 2},
    "ffn": {"kind": "dense", "d_ff": 6},
}
MOE = {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 5}
PEER = {"kind": "peer", "num_experts": 16, "num_heads": 2, "top_k": 3, "d_key": 4}


def raw(blocks):
    return {"d_model": 8, "vocab_size": 17, "seq_len": 9, "blocks": blocks}


def kinds(pattern):
    return [(block.kind, getattr(block, "inner", block).ffn.kind) for block in parse(ModelConfig, raw(pattern)).blocks]


@pytest.mark.parametrize(
    ("at", "count", "wanted"),
    [
        ("every", 3, [0, 1, 2]),
        ("every-1", 3, [0, 1, 2]),
        ("every-2", 5, [1, 3]),
        ("every-3", 6, [2, 5]),
        ("middle", 12, [6]),
        ("middle", 1, [0]),
        ([2, 0], 3, [2, 0]),
        ([], 3, []),
    ],
)
def test_block_positions_by_pattern(at, count, wanted):
    assert places(at, count) == wanted


def test_patterns_replace_feed_forwards_and_wrap_blocks():
    plain, moe, mod = ("block", "dense"), ("block", "moe"), ("mod", "dense")
    assert kinds({"count": 3, "each": BLOCK}) == [plain] * 3
    assert kinds({"count": 4, "each": BLOCK, "ffn": {"at": "middle", **MOE}}) == [plain, plain, moe, plain]
    assert kinds({"count": 4, "each": BLOCK, "wrap": {"at": "every-2", "kind": "mod"}}) == [plain, mod, plain, mod]
    both = {"count": 2, "each": BLOCK, "ffn": {"at": [1], **MOE}, "wrap": {"at": [1], "kind": "mod"}}
    assert kinds(both) == [plain, ("mod", "moe")]
    assert kinds({"count": 2, "each": BLOCK, "ffn": MOE}) == [moe, moe]


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [
        ({"count": 2, "each": BLOCK, "ffn": {"at": "every-0", **MOE}}, "at=every-0 must be every, every-N, middle"),
        ({"count": 2, "each": BLOCK, "ffn": {"at": "last", **MOE}}, "at=last must be every, every-N, middle"),
        ({"count": 2, "each": BLOCK, "ffn": {"at": [2], **MOE}}, "or a list of block positions from 0 to 1"),
        ({"count": 2, "each": BLOCK, "ffn": {"at": 1, **MOE}}, "at=1 must be every, every-N, middle, or a list"),
        ({"count": 2, "each": BLOCK, "fnn": MOE}, "blocks.fnn is no part of a pattern; known: count, each, ffn, wrap"),
        ({"count": 2, "each": BLOCK, "ffn": "moe"}, "blocks.ffn=moe must be settings"),
        ({"count": 0, "each": BLOCK}, "a pattern of blocks needs count"),
        ({"count": 2}, "a pattern of blocks needs count"),
        ([], "blocks"),
        ([BLOCK, BLOCK | {"ffn": MOE | {"top_k": 9}}], r"blocks.1.ffn.top_k=9 must lie in [1, num_experts=4]"),
        ([{"kind": "mod", "inner": BLOCK | {"ffn": {"kind": "mo"}}}], "blocks.0.inner.ffn.kind=mo is none of "),
        (
            [BLOCK | {"mixer": {"kind": "attention", "num_head": 2}}],
            "blocks.0.mixer.num_head=2 is no setting here; did you",
        ),
    ],
)
def test_bad_blocks_are_refused_in_one_line(blocks, wanted):
    with pytest.raises(ConfigError) as caught:
        parse(ModelConfig, raw(blocks))
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blocks_that_are_all_wrong_are_not_called_too_few_as_well():
    with pytest.raises(ConfigError) as caught:
        parse(ModelConfig, raw([BLOCK | {"precision": "ternary"}] * 2))
    known = "precision=ternary is no setting here (known: mixer, ffn, norm)"
    assert str(caught.value) == f"blocks.0.{known}; blocks.1.{known}"


def test_a_width_that_fits_no_head_is_refused_with_the_block():
    with pytest.raises(ConfigError, match=r"^blocks.1: num_heads=3 must give every head an even width"):
        build_model(raw([BLOCK, BLOCK | {"mixer": {"kind": "attention", "num_heads": 3}}]))


def test_models_of_different_kinds_share_the_values_of_the_parts_they_share():
    plain = build_model(raw([BLOCK, BLOCK])).state_dict()
    for ffn in (MOE, PEER):
        other = build_model(raw([BLOCK, BLOCK | {"ffn": ffn}])).state_dict()
        shared = plain.keys() & other.keys()
        assert {"embed.weight", "blocks.0.ffn.up.weight", "blocks.1.mixer.q.weight"} <= shared
        assert all(torch.equal(plain[name], other[name]) for name in shared)


def test_the_seed_alone_decides_the_initial_values():
    torch.manual_seed(5)
    first = build_model(raw([BLOCK | {"ffn": PEER}]), seed=1).state_dict()
    torch.manual_seed(6)
    again, other = (build_model(raw([BLOCK | {"ffn": PEER}]), seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if "norm" not in name and "bias" not in name]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
    weights = [first[f"blocks.0.mixer.{name}.weight"] for name in "qkvo"]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_logits_are_the_normed_stream_against_the_embeddings():
    model, tokens = build_model(raw([BLOCK, BLOCK])).double().eval(), torch.randint(17, (2, 9))
    x = model.embed.weight[tokens]
    for block in model.blocks:
        x = x + block(x, Ctx(causal=True))[0]
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.weight
    torch.testing.assert_close(model(tokens).logits, normed @ model.embed.weight.T, rtol=0, atol=1e-11)
    assert [name for name, p in model.named_parameters() if p.shape[0] == 17] == ["embed.weight"]


def test_losses_and_statistics_are_named_by_module_paths():
    wrapped = {"kind": "mod", "inner": BLOCK | {"ffn": PEER}}
    model = build_model(raw([BLOCK | {"ffn": MOE}, wrapped]))
    aux = model(torch.randint(17, (2, 9))).aux
    assert set(aux.losses) == {"blocks.0.ffn.balance", "blocks.1.predictor"}
    paths = dict(model.named_modules())
    for name in (*aux.losses, *aux.stats):
        assert name.rpartition(".")[0] in paths, name
    assert "blocks.1.inner.ffn.query_norm.mean" in aux.stats


def test_an_untrained_model_guesses():
    model, tokens = build_model(raw([BLOCK, BLOCK])), torch.randint(17, (8, 9))
    nats = token_nats(model(tokens).logits, tokens.roll(-1, 1)).detach()
    assert float(nats.mean()) == pytest.approx(math.log(17), rel=0.02)


def test_token_nats_are_minus_log_softmax_and_zero_without_a_target():
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[0, 4, -100], [-100, 2, 1]])
    nats = token_nats(logits, targets)
    for b in range(2):
        for t in range(3):
            scores = logits[b, t].tolist()
            own = math.log(sum(map(math.exp, scores))) - scores[targets[b, t]] if targets[b, t] >= 0 else 0
            assert float(nats[b, t]) == pytest.approx(own, abs=1e-12)
    assert token_nats(logits.bfloat16(), targets).dtype == torch.float32


def test_one_precision_reaches_every_layer_that_has_it_and_gives_none_itself():
    moe = {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 5}
    raw = {
        "d_model": 8,
        "vocab_size": 17,
        "seq_len": 9,
        "precision": "ternary",
        "blocks": {
            "count": 4,
            "each": {
                "kind": "block",
                "mixer": {"kind": "attention", "num_heads": 2, "precision": "float"},
                "ffn": {"kind": "dense", "d_ff": 6},
            },
            "ffn": {"at": [1], "kind": "mh_moe", "num_heads": 2, "inner": moe},
            "wrap": {"at": [1, 3], "kind": "mod"},
        },
    }
    config = parse(ModelConfig, raw)
    blocks = config.model_dump(mode="json")["blocks"]
    assert [block.get("inner", block)["mixer"]["precision"] for block in blocks] == ["float"] * 4
    assert [block.get("inner", block)["ffn"]["precision"] for block in blocks] == ["ternary"] * 4
    assert blocks[1]["inner"]["ffn"]["inner"]["precision"] == "ternary"
    assert parse(ModelConfig, config.model_dump(mode="json")) == config
    assert config.replace(seq_len=10).blocks == config.blocks
    long = raw | {"precision": {"weights": "ternary", "warmup_steps": 3}}
    assert parse(ModelConfig, long).blocks[0].ffn.precision.warmup_steps == 3
    with pytest.raises(
        ConfigError, match=r"^precision: 'ternery' is none of float, ternary; did you mean 'ternary'\?$"
    ):
        parse(ModelConfig, raw | {"precision": "ternery"})
    with pytest.raises(ConfigError, match=r"precision\.warmup_steps=-3"):
        parse(ModelConfig, raw | {"precision": {"weights": "ternary", "warmup_steps": -3}})


def test_one_norm_reaches_every_block_that_gives_none_itself_and_the_last_one():
    blocks = {"count": 3, "each": BLOCK, "wrap": {"at": [1], "kind": "mod"}}
    written = [BLOCK, {"kind": "mod", "inner": BLOCK}, BLOCK | {"norm": "rms"}]
    for given in (blocks, written):
        config = parse(ModelConfig, raw(given) | {"norm": {"kind": "layer", "eps": 1e-5}})
        norms = [getattr(block, "inner", block).norm for block in config.blocks]
        assert [norm.kind for norm in norms] == ["layer", "layer", "layer" if given is blocks else "rms"]
        assert config.norm == norms[0] and config.norm.eps == 1e-5
        assert parse(ModelConfig, config.model_dump(mode="json")) == config
    assert parse(ModelConfig, raw([BLOCK])).model_dump(mode="json")["norm"] == "rms"
    with pytest.raises(ConfigError, match=r"^norm: 'layr' is none of rms, layer; did you mean 'layer'\?$"):
        parse(ModelConfig, raw([BLOCK]) | {"norm": "layr"})


GPT = {"norm": "layer", "tie_embeddings": False, "learned_positions": 12}


def test_an_untied_head_and_learned_positions_are_read_where_the_equation_says():
    model, tokens = build_model(raw([BLOCK]) | GPT).double().eval(), torch.randint(17, (2, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for positions in (None, torch.stack([torch.arange(9) + 3, torch.arange(9)])):
        ctx = Ctx(positions, causal=True)
        x = model.embed.weight[tokens] + model.positions.weight[torch.arange(9) if positions is None else positions]
        x = x + model.blocks[0](x, ctx)[0]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        wanted = (x * model.norm.weight + model.norm.bias) @ model.lm_head.weight.T
        torch.testing.assert_close(model(tokens, ctx).logits, wanted, rtol=0, atol=1e-11)


def test_the_loss_of_an_untied_head_is_that_of_its_logits_with_every_gradient():
    model, tokens = build_model(raw([BLOCK]) | GPT).double(), torch.randint(17, (2, 9))
    targets = tokens.roll(-1, 1)
    targets[0, -1] = -100
    parameters = dict(model.named_parameters())
    plain = token_nats(model(tokens).logits, targets).sum() / 17
    wanted = torch.autograd.grad(plain, list(parameters.values()))
    loss = model.loss(tokens, targets)
    torch.testing.assert_close(loss.mean, plain, rtol=0, atol=1e-11)
    for name, got, want in zip(parameters, torch.autograd.grad(loss.mean, [*parameters.values()]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11, msg=name)
        assert want.abs().max() > 0, name


def test_an_untied_untrained_model_guesses_and_its_tables_are_drawn_apart():
    model = build_model(raw([BLOCK]) | GPT)
    tokens = torch.randint(17, (8, 9))
    nats = token_nats(model(tokens).logits, tokens.roll(-1, 1)).detach()
    assert float(nats.mean()) == pytest.approx(math.log(17), rel=0.02)
    weights = [model.embed.weight, model.lm_head.weight, model.positions.weight]
    assert all(0.015 < float(weight.detach().std()) < 0.025 for weight in weights)
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(build_model(raw([BLOCK])).embed.weight, weights[0])


def test_learned_positions_end_with_a_sentence():
    model = build_model(raw([BLOCK]) | GPT).eval()
    cache = Cache(1)
    model(torch.randint(17, (1, 12)), Ctx(causal=True, cache=cache))
    for said, ctx in ((13, Ctx(causal=True)), (1, Ctx(causal=True, cache=cache))):
        with pytest.raises(ConfigError, match=r"^learned_positions=12 must cover every token: one is at position 12;"):
            model(torch.randint(17, (1, said)), ctx)
    with pytest.raises(ConfigError, match=r"^seq_len=13 must be at most learned_positions=12$"):
        parse(ModelConfig, raw([BLOCK]) | GPT | {"seq_len": 13})
