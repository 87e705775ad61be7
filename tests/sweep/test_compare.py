"""The runs that a comparison makes of its kinds."""

import pytest

from sparsemix.config import ConfigError, parse
from sparsemix.data import DataConfig
from sparsemix.layers.sizing import SIZES
from sparsemix.layers.ternary import PrecisionConfig
from sparsemix.reproduce.lab import ReproduceConfig
from sparsemix.sweep.arms import rate_by_rule
from sparsemix.sweep.compare import CompareConfig, kind_config
from sparsemix.sweep.isoflop_study import IsoflopConfig

SETTINGS = CompareConfig()


def config_of(kind, settings=SETTINGS):
    return kind_config(settings, kind, DataConfig(), 1e13)


def precisions(layer):
    own = [layer.precision] if hasattr(layer, "precision") else []
    return own + [precision for child in layer.children() for precision in precisions(child)]


@pytest.mark.parametrize("kind", ["dense", "mod", *SIZES])
def test_a_ternary_kind_is_that_kind_with_ternary_matrices_at_the_same_flops(kind):
    plain, ternary = config_of(kind), config_of(f"{kind}@ternary")
    assert ternary.model.cost().flops == plain.model.cost().flops
    assert ternary.steps == plain.steps
    assert ternary.model.cost().bytes < plain.model.cost().bytes
    for config, weights in ((plain, "float"), (ternary, "ternary")):
        found = [p for block in config.model.blocks for p in precisions(block)]
        assert found and set(found) == {PrecisionConfig(weights=weights)}
    dumped = ternary.model.model_dump(mode="json")
    assert str(dumped).replace("'precision': 'ternary'", "'precision': 'float'") == str(
        plain.model.model_dump(mode="json")
    )


@pytest.mark.parametrize(("placement", "experts"), [("middle", [1, 3]), ("every-2", [1, 3]), ("every", [0, 1, 2, 3])])
def test_staged_mode_has_its_experts_inside_the_wrapped_blocks(placement, experts):
    blocks = config_of("mod+moe", SETTINGS.replace(placement=placement)).model.blocks
    assert [block.kind for block in blocks] == ["block", "mod", "block", "mod"]
    inside = [getattr(block, "inner", block).ffn.kind for block in blocks]
    assert [i for i, kind in enumerate(inside) if kind == "moe"] == experts
    alone = config_of("moe", SETTINGS.replace(placement="every")).model.blocks[0].ffn
    assert blocks[1].inner.ffn == alone


def test_the_rate_by_rule_is_that_of_the_width_for_every_precision_and_a_given_one_is_kept():
    for kind in ("dense", "moe@ternary"):
        assert config_of(kind).train.lr == rate_by_rule(64)
    for kind in ("dense", "dense@ternary"):
        assert config_of(kind, SETTINGS.replace(lr="0.003")).train.lr == 0.003


def test_a_recipe_may_be_ternary_and_a_kind_float():
    settings = SETTINGS.replace(overrides=("model.precision=ternary",))
    assert config_of("dense", settings) == config_of("dense@ternary")
    assert config_of("dense@float", settings) == config_of("dense")
    assert config_of("dense@float") == config_of("dense")


@pytest.mark.parametrize("config", [CompareConfig, IsoflopConfig, ReproduceConfig])
@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("train.lr=0.001", "train.lr"),
        (" train.lr =0.001", "train.lr"),
        ("train={lr: 0.001, warmup: 0.1}", "train.lr"),
        ("train.budget_flops=1e12", "train.budget_flops"),
        ("seed=3", "seed"),
        ("data.text=[a.txt]", "data.text"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(config, override, setting):
    budgets = {"budgets": (1e12,)} if config is IsoflopConfig else {}
    with pytest.raises(ConfigError, match=f"would have no effect: .* decides {setting}"):
        parse(config, {"overrides": (override,), **budgets})
    parse(config, {"overrides": ("train.warmup=0.1", "data.test_fraction=0.1"), **budgets})


@pytest.mark.parametrize("budget", ["auto:0s", "auto:0.0min", "auto:0h"])
def test_a_budget_of_no_time_is_refused(budget):
    with pytest.raises(ConfigError, match=f"budget={budget} must give a time above 0"):
        parse(CompareConfig, {"budget": budget})
