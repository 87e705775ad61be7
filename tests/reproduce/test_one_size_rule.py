"""Whoever chooses a layer's sizes asks `layers/sizing.py`: comparisons, reproductions, conversions and recipes."""

import pytest

from sparsemix.config import parse
from sparsemix.data import DataConfig
from sparsemix.interop.plan import ConvertConfig, plan
from sparsemix.layers import AttentionConfig, BlockConfig, DenseConfig, LayerConfig, MoDConfig, PEERConfig, PKMConfig
from sparsemix.layers.sizing import MIN_KEY, example, key_width, mod_wrap, predictor_width, sized_ffn
from sparsemix.model import ModelConfig
from sparsemix.recipes import recipes, settings_of, sizes_of
from sparsemix.reproduce.base import SCALES
from sparsemix.reproduce.lab import reproduction
from sparsemix.reproduce.peer import methods
from sparsemix.sweep.arms import Arm, backbone, rate_by_rule, run_config

FAMILY = {"peer": "PEER", "peer-pkm": "PKM", "peer-moe": "MoE", "peer-dense": "Dense"}
ALL = [f"{name}:{size}" if size else name for name in recipes() for size in (sizes_of(name) or [""])]


def model_of(recipe):
    return parse(ModelConfig, settings_of(recipe)["model"])


def layers_of(config):
    """A layer and all in it."""
    yield config
    for value in dict(config).values():
        if isinstance(value, LayerConfig):
            yield from layers_of(value)


def all_layers(model):
    return [layer for block in model.blocks for layer in layers_of(block)]


def decoder(d_model, activation="swiglu"):
    ffn = DenseConfig(d_ff=4 * d_model, activation=activation)
    block = BlockConfig(mixer=AttentionConfig(num_heads=4), ffn=ffn)
    return ModelConfig(d_model=d_model, vocab_size=272, seq_len=32, blocks=(block, block))


@pytest.mark.parametrize("kind", ["peer", "pkm", "mh_moe"])
@pytest.mark.parametrize("d_model", [16, 24, 32, 48, 64, 128, 256])
def test_a_comparison_a_conversion_and_the_example_have_one_size(kind, d_model):
    model = decoder(d_model)
    dense = model.blocks[0].ffn
    wanted = LayerConfig.model_validate(sized_ffn(kind, dense, d_model, model.seq_len))
    # A fresh one takes the feed-forward's place.
    assert plan(model, ConvertConfig(ffn={"kind": kind}, init="fresh")).model.blocks[0].ffn == wanted
    raw = {"model": model.model_dump(mode="json"), "train": {}}
    raw["model"]["blocks"] = {"count": 2, "each": raw["model"]["blocks"][0]}
    compared = run_config(Arm(kind, kind), raw, DataConfig(vocab_size=272), 1e11)
    assert compared.model.blocks[1].ffn == wanted
    thirds = DenseConfig(d_ff=d_model * 8 // 3)
    assert example(kind, d_model, 32) == LayerConfig.model_validate(sized_ffn(kind, thirds, d_model, 32))


@pytest.mark.parametrize("d_model", [24, 64, 512])
def test_a_converted_block_has_the_predictor_of_a_compared_one(d_model):
    wrapped = plan(decoder(d_model), ConvertConfig(mod={"capacity": 0.5})).model.blocks[1]
    assert wrapped.predictor_width == mod_wrap(d_model)["predictor_width"] == predictor_width(d_model)


@pytest.mark.parametrize("d_model", [16, 20, 24, 32, 40, 48, 64, 96, 128, 256, 512, 1024])
def test_a_conversion_gives_no_sub_key_below_the_floor(d_model):
    for kind in ("peer", "pkm"):
        for init in ("upcycle", "keep", "fresh"):
            added = plan(decoder(d_model), ConvertConfig(ffn={"kind": kind}, init=init)).swaps[0].added
            assert added.d_key == key_width(d_model) >= MIN_KEY


@pytest.mark.parametrize("scale", ["demo", "laptop", "gpu"])
@pytest.mark.parametrize("name", ["peer-fig1", "peer-fig3a", "peer-fig3b", "peer-fig4", "peer-granularity"])
def test_a_reproduction_gives_no_sub_key_below_the_floor(name, scale):
    arms = [arm for arm in reproduction(name).design(SCALES[scale]).arms if arm.kind in ("peer", "pkm")]
    assert arms
    for d_model in range(16, 1025, 8):
        for arm in arms:
            d_key = arm.sized(DenseConfig(d_ff=4 * d_model), d_model)["d_key"]
            assert d_key == key_width(d_model) >= MIN_KEY


@pytest.mark.parametrize("scale", ["demo", "laptop", "gpu"])
@pytest.mark.parametrize("recipe", FAMILY)
def test_a_recipe_of_the_papers_family_is_what_its_reproduction_trains(recipe, scale):
    size = SCALES[scale].size
    arm = next(arm for arm in methods(SCALES[scale]) if arm.name == FAMILY[recipe])
    raw = backbone(f"peer-dense:{size}")
    reproduced = run_config(arm, raw, DataConfig(vocab_size=raw["model"]["vocab_size"]), 1e16)
    assert reproduced.model.blocks == model_of(f"{recipe}:{size}").blocks


@pytest.mark.parametrize("recipe", ALL)
def test_a_recipe_has_no_sub_key_below_the_floor_and_the_rules_predictor(recipe):
    model = model_of(recipe)
    for layer in all_layers(model):
        if isinstance(layer, (PEERConfig, PKMConfig)):
            assert layer.d_key >= MIN_KEY
        if isinstance(layer, MoDConfig):
            assert layer.predictor_width == predictor_width(model.d_model)


@pytest.mark.parametrize("kind", ["peer", "mod"])
def test_a_tiny_recipe_is_what_compare_makes_of_tiny(kind):
    compared = run_config(Arm(kind, kind), backbone("tiny"), DataConfig(vocab_size=1024), 7e11)
    assert model_of(f"tiny-{kind}").blocks == compared.model.blocks


@pytest.mark.parametrize(
    "recipe", ["tiny", "small", *(f"{f}:{s}" for f in (*FAMILY, "mod", "mh-moe") for s in ("30k", "300k", "3M", "30M"))]
)
def test_a_recipe_below_the_papers_scale_has_the_rate_of_the_rule(recipe):
    raw = settings_of(recipe)
    assert raw["train"]["lr"] == pytest.approx(rate_by_rule(raw["model"]["d_model"]), rel=0.02)
