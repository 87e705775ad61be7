"""A converted decoder starts with equal logits where the mathematics allows it, and says where it does not."""

import pytest
import torch
from small import D, F, batch, decoder, shaken, tokens

from sparsemix.config import ConfigError, parse
from sparsemix.interop.convert import convert, observe
from sparsemix.interop.plan import ConvertConfig
from sparsemix.layers import Ctx
from sparsemix.layers.cache import Cache

pytestmark = pytest.mark.usefixtures("unchecked")

FLOATING_TERNARY = {"weights": "ternary", "sub_norm": False, "warmup_steps": 10}
SMALL_PEER = {"kind": "peer", "num_experts": 49, "num_heads": 2, "top_k": 5, "d_key": 4}
EQUAL = {
    "moe": {"kind": "moe"},
    "moe_top_1": {"kind": "moe", "num_experts": 5, "top_k": 1},
    "moe_slices": {"kind": "moe", "num_experts": 12, "top_k": 6, "d_ff": F // 3},
    "moe_all": {"kind": "moe", "num_experts": 4, "top_k": 4, "normalize_gates": False},
    "moe_all_slices": {"kind": "moe", "num_experts": 6, "top_k": 6, "d_ff": F // 2, "normalize_gates": False},
    "moe_shared": {"kind": "moe", "shared_d_ff": 7},
    "moe_bias": {"kind": "moe", "bias_rate": 0.01, "capacity_factor": 0.5},
    "moe_ternary_later": {"kind": "moe", "precision": FLOATING_TERNARY},
    "mode": {"kind": "mode"},
    "mode_slices": {"kind": "mode", "top_k": 2, "d_ff": F // 2},
    "expert_choice_all": {"kind": "expert_choice", "num_experts": 4, "capacity_factor": 4.0},
    "expert_choice_slices": {"kind": "expert_choice", "num_experts": 4, "capacity_factor": 4.0, "d_ff": F // 2},
    "dense": {"kind": "dense"},
    "dense_ternary_later": {"kind": "dense", "precision": FLOATING_TERNARY},
    "peer": SMALL_PEER,
    "pkm": {"kind": "pkm", "num_values": 49, "num_heads": 2, "top_k": 5, "d_key": 4},
    "mh_moe": {"kind": "mh_moe"},
}
APART = {
    "moe_raw_gates": ({"kind": "moe", "normalize_gates": False}, "gates do not sum to 1"),
    "moe_half_a_whole": ({"kind": "moe", "top_k": 3, "d_ff": F // 2}, "top_k=3 is no multiple of the 2 slices"),
    "mode_three": ({"kind": "mode", "num_experts": 3, "top_k": 3}, "a later pick may be a no-op"),
    "mode_raw_gates": ({"kind": "mode", "normalize_gates": False}, "gates do not sum to 1"),
    "mode_choice": ({"kind": "mode", "routing": "expert_choice"}, "by none at times"),
    "expert_choice": ({"kind": "expert_choice"}, "taken by 2 experts on average"),
    "moe_ternary": ({"kind": "moe", "precision": "ternary"}, "norm before the last matrix is new; weights are rounded"),
    "dense_ternary": ({"kind": "dense", "precision": {"weights": "ternary", "sub_norm": False}}, "rounded to three"),
}


def converted(model, **settings):
    """The converted model, its running statistics observed."""
    result = convert(model, parse(ConvertConfig, settings))
    observe(result, [batch()])
    return result


def apart(model, other):
    """The largest difference of logits, causally, and with another routing rule none."""
    with torch.no_grad():
        return float((model(tokens(), Ctx(causal=True)).logits - other(tokens(), Ctx(causal=True)).logits).abs().max())


@pytest.mark.parametrize("mod", [None, {"capacity": 0.25}], ids=["plain", "mod"])
@pytest.mark.parametrize("init", ["upcycle", "keep"])
@pytest.mark.parametrize("ffn", EQUAL.values(), ids=EQUAL)
def test_a_converted_decoder_starts_with_the_logits_of_its_source(ffn, init, mod):
    model = decoder()
    result = converted(model, ffn=ffn, layers="1,2", init=init, mod=mod)
    assert apart(result.model, model) < 1e-11
    assert all(swap.why is None for swap in result.plan.swaps if swap.how == "copied")
    # The control: drawn anew, the same layers do not.
    assert apart(converted(model, ffn=ffn, layers="1,2", init="fresh", mod=mod).model, model) > 1e-3


@pytest.mark.parametrize(("ffn", "why"), APART.values(), ids=APART)
def test_where_copies_cannot_be_equal_the_plan_says_why(ffn, why):
    model = decoder()
    result = converted(model, ffn=ffn, layers=(1,))
    (swap,) = result.plan.swaps
    assert swap.how == "copied" and swap.why is not None and why in swap.why
    assert apart(result.model, model) > 1e-9
    assert apart(converted(model, ffn=ffn, layers=(1,), init="keep").model, model) < 1e-11


def test_peer_copies_neurons_where_its_heads_read_them_all():
    model = decoder(activation="gelu")
    all_of_them = SMALL_PEER | {"num_experts": 81, "top_k": 81}
    result = converted(model, ffn=all_of_them)
    assert {swap.how for swap in result.plan.swaps} == {"copied"}
    assert apart(result.model, model) < 1e-11
    assert result.model.blocks[0].ffn.w_out[2 * F :].abs().max() == 0  # type: ignore[union-attr]
    reasons = {
        "a head reads top_k=80": all_of_them | {"top_k": 80},
        "relu without bias": all_of_them | {"activation": "relu"},
    }
    for why, ffn in reasons.items():
        result = converted(model, ffn=ffn)
        assert {swap.how for swap in result.plan.swaps} == {"kept"} and why in str(result.plan.swaps[0].why)
        assert apart(result.model, model) < 1e-11


@pytest.mark.parametrize("ffn", [{"kind": "moe"}, {"kind": "dense"}, SMALL_PEER], ids=["moe", "dense", "peer"])
def test_a_feed_forward_with_biases_is_copied_or_kept_whole(ffn):
    model = shaken(
        {
            "count": 2,
            "each": {
                "kind": "block",
                "mixer": {"kind": "attention", "num_heads": 3, "bias": "all", "rope_theta": None},
                "ffn": {"kind": "dense", "d_ff": F, "activation": "gelu_tanh", "bias": True},
            },
        },
        norm="layer",
        learned_positions=40,
        tie_embeddings=False,
    )
    assert apart(converted(model, ffn=ffn, mod={"capacity": 0.5}).model, model) < 1e-11


def test_moe_and_expert_choice_keep_the_feed_forward_as_their_shared_expert_and_others_beside_them():
    def kinds(**ffn):
        result = converted(decoder(), ffn=ffn, layers=(0,), init="keep")
        swap = result.plan.swaps[0]
        return swap.new.kind, getattr(swap.new, "shared_d_ff", None)  # type: ignore[attr-defined]

    assert kinds(kind="moe") == ("moe", F)
    assert kinds(kind="expert_choice") == ("expert_choice", F)
    assert kinds(kind="mh_moe") == ("mh_moe", F)
    assert kinds(kind="mode")[0] == kinds(**SMALL_PEER)[0] == "beside"
    assert kinds(kind="moe", shared_d_ff=5)[0] == kinds(kind="moe", activation="relu")[0] == "beside"


def test_every_tensor_has_an_origin_and_none_of_the_source_is_lost_unsaid():
    model = decoder()
    for settings in ({"init": "upcycle"}, {"init": "keep"}, {"init": "fresh"}):
        result = converted(model, ffn={"kind": "moe"}, layers=(1,), mod={"capacity": 0.25}, **settings)
        said = result.origins
        named = [*said.carried, *said.made, *said.drawn]
        assert len(named) == len(set(named))
        assert set(named) >= {name for name, _ in result.model.named_parameters()}
        lost = [] if settings["init"] != "fresh" else [f"blocks.1.ffn.{m}.weight" for m in ("gate", "up", "down")]
        assert sorted(said.dropped) == sorted(lost)
        old, new = model.state_dict(), result.model.state_dict()
        assert all(torch.equal(new[name], old[source]) for name, source in said.carried.items())
    assert said.carried["blocks.1.inner.mixer.q.weight"] == "blocks.1.mixer.q.weight"


def test_noise_is_a_share_of_a_weights_deviation_and_follows_the_seed():
    model = decoder()
    plain, once, again, other = (
        converted(model, ffn={"kind": "moe"}, layers=(1,), noise=noise, seed=seed)
        for noise, seed in ((0.0, 0), (0.1, 0), (0.1, 0), (0.1, 1))
    )
    down = [result.model.state_dict()["blocks.1.ffn.experts.down"] for result in (plain, once, again, other)]
    assert float((down[1] - down[0]).std() / down[0].std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(down[1], down[2]) and not torch.equal(down[1], down[3])
    assert not torch.equal(down[1][0], down[1][1])
    assert "noise of 0.1" in str(once.plan.swaps[0].why) and apart(once.model, model) > 1e-6


def test_experts_that_make_up_one_whole_are_picked_together():
    result = converted(decoder(), ffn={"kind": "moe", "num_experts": 12, "top_k": 3, "d_ff": F // 3}, layers=(1,))
    layer = result.model.blocks[1].ffn
    picks = layer.router(torch.randn(50, D, dtype=torch.float64)).topk(3).indices.sort().values  # type: ignore
    assert (picks // 3 == picks[:, :1] // 3).all() and len(picks.unique()) > 3


def test_a_source_with_routed_layers_keeps_their_state():
    block = {"kind": "block", "mixer": {"kind": "attention", "num_heads": 3}}
    dense = block | {"ffn": {"kind": "dense", "d_ff": F}}
    blocks = [dense, {"kind": "mod", "capacity": 0.5, "anneal_steps": 8, "inner": dense}, block | {"ffn": SMALL_PEER}]
    model = shaken(blocks)
    model.blocks[2].ffn.query_norm.num_updates.fill_(3)  # type: ignore[union-attr]
    model.blocks[1].annealing.step.fill_(7)  # type: ignore[union-attr]
    model.blocks[1].annealing.set_slack()  # type: ignore[union-attr, operator]
    result = converted(model, ffn={"kind": "expert_choice", "capacity_factor": 8.0}, layers=(0, 1), init="upcycle")
    assert apart(result.model, model) < 1e-11
    assert result.model.blocks[1].slack == model.blocks[1].slack == 0.25
    assert result.origins.carried["blocks.1.inner.ffn_norm.weight"] == "blocks.1.inner.ffn_norm.weight"
    kept = converted(model, ffn={"kind": "moe", "d_ff": 5, "num_experts": 3, "top_k": 1}, layers=(2,), init="keep")
    assert apart(kept.model, model) < 1e-11


def test_mod_conversion_decodes_step_by_step_as_its_source_until_it_is_trained():
    model = decoder()
    for sampling in ("predictor", "threshold"):
        wrap = {"capacity": 0.25, "every": 1, "sampling": sampling}
        result = converted(model, mod=wrap).model
        cache = Cache(3)
        with torch.no_grad():
            steps = [result(tokens()[:, t : t + 1], Ctx(causal=True, cache=cache)).logits for t in range(10)]
            wanted = model(tokens()[:, :10]).logits
        torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=0, atol=1e-11)


def test_at_its_first_step_a_mod_conversion_trains_every_token_as_its_source_does():
    model = decoder()
    result = converted(model, mod={"capacity": 0.25, "anneal_steps": 9})
    with torch.no_grad():
        got = result.model.train()(tokens()).logits
    torch.testing.assert_close(got, model(tokens()).logits.detach(), rtol=0, atol=1e-11)
    # The control: at the goal capacity it does not.
    result.model.blocks[1].annealing.step.fill_(9)  # type: ignore[union-attr]
    result.model.blocks[1].annealing.set_slack()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        assert (result.model(tokens()).logits - got).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ffn": {"kind": "mao"}}, r"ffn=mao is none of dense, moe"),
        ({"ffn": {"kind": "attention"}}, r"ffn=attention is none of dense, moe"),
        ({"ffn": {"kind": "moe", "experts": 3}}, r"ffn: experts=3 is no setting here"),
        ({"ffn": {"kind": "moe", "d_ff": 7}}, r"ffn: d_ff=7 must divide the feed-forward's 36"),
        ({"ffn": {"kind": "moe", "d_ff": 12, "num_experts": 7}}, r"num_experts=7 must be a multiple of the 3 slices"),
        ({"ffn": {"kind": "moe", "activation": "relu"}}, r"activation=relu must be the feed-forward's swiglu"),
        ({"ffn": {"kind": "dense", "d_ff": 9}}, r"d_ff=9 must be the feed-forward's 36"),
        ({"ffn": {"kind": "peer", "num_experts": 50}}, r"ffn: num_experts=50 must be a square"),
        ({"ffn": {"kind": "moe"}, "layers": "3"}, r"layers=.* must be every, .* from 0 to 2"),
        ({"ffn": {"kind": "moe"}, "layers": "every-4"}, r"layers=every-4 names no block"),
        ({"ffn": {"kind": "moe"}, "layers": "mid"}, r"layers=mid must be every"),
        (
            {"ffn": {"kind": "moe"}, "noise": 0.1, "init": "keep"},
            r"noise=0.1 is added to copies: it needs init",
        ),
        ({"ffn": {"kind": "moe"}, "init": "copy"}, r"init=copy input should be"),
        ({"mod": {"every": 0}}, r"mod.every=0 must be a whole number"),
        ({"mod": {"every": 4}}, r"mod.every=4 wraps no block"),
        ({"mod": {"capacity": 2.5}}, r"mod: capacity=2.5 must be a ratio"),
        ({"mod": {"gate": "sigmoid"}}, r"mod.gate=sigmoid does not start as the block alone"),
        ({"mod": {"selector": "random"}}, r"mod.selector=random does not start as the block alone"),
        ({"mod": {"sampling": "router_bce"}}, r"mod.sampling=router_bce would start with no token"),
        ({"mod": {"anneal_steps": 0}}, r"mod.anneal_steps=0 would start at the goal"),
    ],
    ids=str,
)
def test_a_conversion_that_cannot_be_is_one_line(settings, says):
    with pytest.raises(ConfigError, match=says) as error:
        convert(decoder(), parse(ConvertConfig, settings))
    assert "\n" not in str(error.value)


def test_only_dense_feed_forwards_are_copied_and_only_plain_blocks_wrapped():
    once = converted(decoder(), ffn={"kind": "moe"}, layers=(1,), mod={"capacity": 0.25}).model
    with pytest.raises(ConfigError, match="that of block 1 is moe"):
        convert(once, parse(ConvertConfig, {"ffn": {"kind": "moe"}, "layers": (1,)}))
    with pytest.raises(ConfigError, match="block 1 is wrapped already"):
        convert(once, parse(ConvertConfig, {"mod": {"capacity": 0.25}}))
