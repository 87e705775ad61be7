"""Packaged recipes: every size builds, and has the published counts."""

import math

import pytest
import torch
import yaml

from sparsemix.config import ConfigError, parse
from sparsemix.model import ModelConfig
from sparsemix.recipes import purpose, recipes, settings_of, sizes_of
from sparsemix.settings import RunConfig

ALL = [f"{name}:{size}" if size else name for name in recipes() for size in (sizes_of(name) or [""])]
SCALES = {"30k": 3e4, "300k": 3e5, "3M": 3e6, "30M": 3e7, "100M": 1e8}
FAMILIES = [name for name in recipes() if set(SCALES) <= set(sizes_of(name))]


def run_of(name):
    raw = settings_of(name)
    raw["data"] = {"vocab_size": raw["model"]["vocab_size"], **raw.get("data", {})}
    return parse(RunConfig, raw)


def cost_of(name):
    return run_of(name).model.cost()


@pytest.mark.parametrize("name", ALL)
def test_every_size_of_every_recipe_builds_with_the_parameters_that_its_cost_says(name):
    config = run_of(name)
    with torch.device("meta"):
        model = config.model.build()
    assert sum(p.numel() for p in model.parameters()) == config.model.cost().params
    assert config.steps >= 50


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_scaled_size_has_about_the_active_parameters_of_its_name(name, scale):
    # A Mixture-of-Depths runs an eighth of its routed blocks; its dense twin runs them all.
    tolerance = (0.75, 1.9) if name == "mod-dense" else (0.75, 1.25)
    assert tolerance[0] <= cost_of(f"{name}:{scale}").active_params / SCALES[scale] <= tolerance[1]


def test_the_three_families_have_every_scale():
    papers = {"peer", "peer-pkm", "peer-moe", "peer-dense"}
    papers |= {"mod", "mod-dense", "mh-dense", "mh-sparse", "mh-fine", "mh-moe", "mh-moe-3"}
    assert set(FAMILIES) == papers


# Read off the figures of arXiv:2407.04153: millions of parameters of its dense models at two budgets.
AT_6E18 = {4: 29.1, 5: 45.3, 6: 67.1, 7: 96.4, 8: 134.2, 9: 181.1, 10: 238.0, 11: 307.2, 12: 390, 13: 487}
AT_2E19 = {7: 96.4, 8: 134.2, 9: 181.1, 10: 238.0, 11: 307.2, 12: 390, 13: 487, 14: 598, 16: 871, 18: 1223}


@pytest.mark.parametrize(("depth", "millions"), [*AT_6E18.items(), *AT_2E19.items()])
def test_the_dense_models_of_the_peer_paper_have_its_parameters_within_one_per_cent(depth, millions):
    config = run_of(f"peer-dense:L{depth}").model
    assert (config.d_model, len(config.blocks)) == (128 * depth, depth)
    assert config.cost().params == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("depth", sorted({*AT_6E18, *AT_2E19}))
def test_the_peer_paper_replaces_the_middle_feed_forward(depth):
    d = 128 * depth
    dense = cost_of(f"peer-dense:L{depth}").params
    for name, table in (("peer", 2 * 1024**2 * d), ("peer-pkm", 1024**2 * d)):
        config = run_of(f"{name}:L{depth}").model
        kinds = [block.ffn.kind for block in config.blocks]
        assert kinds == ["dense"] * (depth // 2) + [{"peer": "peer", "peer-pkm": "pkm"}[name]] + ["dense"] * (
            depth - depth // 2 - 1
        )
        # Queries with bias and their norm, and one pair of sub-key lists for all heads of PEER.
        keys = 1024 * 256 * (1 if config.blocks[depth // 2].ffn.share_keys else 8)
        assert config.cost().params == dense - 8 * d**2 + table + (d + 1) * 2048 + 2 * 2048 + keys
    moe = run_of(f"peer-moe:L{depth}").model
    assert moe.blocks[depth // 2].ffn.kind == "expert_choice"
    assert moe.cost().params == dense - 8 * d**2 + 128 * 8 * d**2 + 128 * d


def test_peer_models_have_the_published_billions():
    # arXiv:2407.04153: 1.108 to 3.98 billion at 6e18 FLOPs, 1.98 to 6.03 at 2e19.
    for depth, billions in ((4, 1.108), (13, 3.98), (7, 1.98), (18, 6.03)):
        assert cost_of(f"peer:L{depth}").params == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("512x12", 38), ("1024x14", 176), ("768x28", 198), ("1280x22", 433), ("1792x24", 925), ("2560x36", 2831)],
)
def test_mixture_of_depths_wraps_every_other_block_at_an_eighth(size, millions):
    dense, mod = run_of(f"mod-dense:{size}").model, run_of(f"mod:{size}").model
    embedding = dense.vocab_size * dense.d_model
    assert dense.cost().params - embedding == pytest.approx(millions * 1e6, rel=0.01)
    assert [block.kind for block in mod.blocks] == ["block", "mod"] * (len(mod.blocks) // 2)
    assert all(block.capacity == 0.125 and block.inner == dense.blocks[0] for block in mod.blocks[1::2])
    assert 0.56 < mod.cost().flops / dense.cost().flops < 0.66


@pytest.mark.parametrize(
    ("name", "millions"),
    [("mh-dense", 84.9), ("mh-sparse", 283.1), ("mh-fine", 283.1), ("mh-moe", 276.0), ("mh-moe-3", 290.2)],
)
def test_the_multi_head_paper_has_its_non_embedding_parameters(name, millions):
    config = run_of(f"{name}:paper").model
    assert (len(config.blocks), config.d_model) == (12, 768)
    router = sum(block.ffn.cost(768, 1).items.get("router", 0) / 2 for block in config.blocks)
    # The published accounting leaves the gate and the norms out.
    heads = {"mh-moe": 2, "mh-moe-3": 3}.get(name, 1)
    gate = router / heads
    assert config.cost().params - 32000 * 768 - gate == pytest.approx(millions * 1e6, rel=0.001)
    routed = [i for i, block in enumerate(config.blocks) if block.ffn.kind != "dense"]
    assert routed == ([] if name == "mh-dense" else [1, 3, 5, 7, 9, 11])


@pytest.mark.parametrize("scale", [*SCALES, "paper"])
def test_the_multi_head_recipes_are_at_parity_at_every_size(scale):
    sparse = cost_of(f"mh-sparse:{scale}")
    for name in ("mh-fine", "mh-moe", "mh-moe-3"):
        other = cost_of(f"{name}:{scale}")
        spent, wanted = (cost.flops - cost.items["router"] for cost in (other, sparse))
        assert spent == pytest.approx(wanted, rel=0.005)
        assert other.params == pytest.approx(sparse.params, rel=0.035)


def test_the_multi_head_paper_trains_for_a_hundred_thousand_steps():
    assert run_of("mh-dense:paper").steps == pytest.approx(100_000, rel=0.02)


def test_a_recipe_without_a_named_size_takes_its_first():
    assert settings_of("peer") == settings_of("peer:30k")
    assert sizes_of("peer")[0] == "30k" and sizes_of("tiny") == []


def test_overrides_go_on_top_of_a_size():
    raw = settings_of("peer:L8", ["model.blocks.ffn.top_k=32", "model.blocks.3.ffn.d_ff=7"])
    config = parse(ModelConfig, raw["model"])
    assert config.d_model == 1024 and config.blocks[4].ffn.top_k == 32 and config.blocks[3].ffn.d_ff == 7


def test_a_base_may_be_a_file_and_a_new_kind_replaces_the_old_settings(tmp_path):
    path = tmp_path / "mine.yaml"
    change = {"base": "tiny", "model": {"blocks": {"each": {"ffn": {"kind": "moe", "num_experts": 4, "top_k": 1}}}}}
    change["model"]["blocks"]["each"]["ffn"]["d_ff"] = 9
    change["sizes"] = {"wide": {"model.d_model": 96}}
    path.write_text(yaml.safe_dump(change))
    raw = settings_of(f"{path}:wide")
    assert raw["model"]["d_model"] == 96 and raw["train"] == settings_of("tiny")["train"]
    assert raw["model"]["blocks"]["each"]["ffn"] == change["model"]["blocks"]["each"]["ffn"]
    assert raw["model"]["blocks"]["each"]["mixer"]["num_heads"] == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("peer:L99", r"recipe=peer:L99 is none of 30k, 300k, .*; did you mean '"),
        ("tiny:30k", "recipe=tiny:30k is no size of it: it has none"),
        ("pear", "recipe=pear is none of .*did you mean 'peer'"),
    ],
)
def test_an_unknown_size_or_recipe_is_one_line(name, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(name)


def test_every_recipe_says_what_it_is():
    for name, path in recipes().items():
        assert len(purpose(path)) > 20, name
        assert math.isfinite(run_of(name).train.budget_flops)
