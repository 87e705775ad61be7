import math

import pytest

from sparsemix.config import ConfigError
from sparsemix.layers import DenseConfig, LayerConfig
from sparsemix.layers.sizing import MAX_TABLE_PARAMS, SIZES, TOLERANCE, example, mod_wrap, sized_ffn
from sparsemix.sweep.arms import split_kind

WIDTHS = [32, 64, 96, 128, 192, 256, 512]


def dense_at(d_model, activation="swiglu"):
    return DenseConfig(d_ff=int(8 / 3 * d_model), activation=activation)


def sized(kind, d_model, activation="swiglu"):
    return LayerConfig.model_validate(sized_ffn(kind, dense_at(d_model, activation), d_model, 128))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("d_model", WIDTHS)
@pytest.mark.parametrize("kind", SIZES)
def test_every_kind_costs_what_the_dense_layer_costs(kind, d_model, activation):
    target = dense_at(d_model, activation).cost(d_model, 128).flops
    assert abs(sized(kind, d_model, activation).cost(d_model, 128).flops / target - 1) <= TOLERANCE == 0.1


@pytest.mark.parametrize("kind", SIZES)
def test_a_sized_layer_builds_at_its_width(kind):
    layer = sized(kind, 32).build(32)
    assert sum(p.numel() for p in layer.parameters()) == sized(kind, 32).cost(32, 1).params


@pytest.mark.parametrize(
    ("kind", "size", "top_k", "tables"), [("peer", "num_experts", 16, 2), ("pkm", "num_values", 32, 1)]
)
@pytest.mark.parametrize("d_model", WIDTHS)
def test_product_keys_find_as_many_rows_as_fit(kind, size, top_k, tables, d_model):
    layer, target = sized(kind, d_model), dense_at(d_model).cost(d_model, 1).flops
    n = math.isqrt(getattr(layer, size))
    assert layer.d_key == max(16, d_model // 4)
    if d_model < 128:
        assert n & (n - 1) == 0 and layer.num_heads == round(d_model / 16) and layer.top_k >= top_k // 2
        # Twice the sub-keys would leave too few picks.
        fewest = layer.replace(**{size: 4 * n * n, "top_k": top_k // 2})
        assert n == 256 or fewest.cost(d_model, 1).flops > 0.95 * target
        assert abs(layer.cost(d_model, 1).flops / target - 1) <= 0.03
        return
    assert layer.top_k == top_k
    larger = layer.replace(**{size: (n + 1) ** 2})
    assert layer.cost(d_model, 1).flops <= target
    full = n + 1 > 1024 or tables * (n + 1) ** 2 * d_model > MAX_TABLE_PARAMS
    assert larger.cost(d_model, 1).flops > target or full
    assert tables * n**2 * d_model <= MAX_TABLE_PARAMS and n <= 1024


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_tables_grow_with_the_width(kind):
    # The widths of a ladder: between them a head more may leave fewer sub-keys.
    params = [sized(kind, width).cost(width, 1).params for width in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)]
    assert params == sorted(params) and len(set(params)) == len(params)


def test_pkm_spends_on_its_picks_what_peer_spends():
    assert sized("pkm", 64).cost(64, 1).items["experts"] == sized("peer", 64).cost(64, 1).items["experts"]


@pytest.mark.parametrize("d_model", WIDTHS)
def test_mh_moe_has_the_parameters_of_moe(d_model):
    mh_moe, moe = (sized(kind, d_model).cost(d_model, 1).params for kind in ("mh_moe", "moe"))
    assert abs(mh_moe / moe - 1) <= 0.1


@pytest.mark.parametrize("d_model", WIDTHS)
def test_moe_has_four_times_the_feed_forward_parameters(d_model):
    assert abs(sized("moe", d_model).cost(d_model, 1).params / dense_at(d_model).cost(d_model, 1).params / 4 - 1) <= 0.1


@pytest.mark.parametrize("d_model", WIDTHS)
def test_expert_choice_is_moe_with_the_choice_turned_round(d_model):
    choice, moe = sized("expert_choice", d_model), sized("moe", d_model)
    assert choice.cost(d_model, 128) == moe.cost(d_model, 128)
    assert choice.capacity_factor == moe.top_k


def test_a_sequence_too_short_for_every_expert_to_pick_its_share_is_refused():
    with pytest.raises(ConfigError, match="kinds=expert_choice cannot be sized"):
        sized_ffn("expert_choice", dense_at(64), 64, 2)


def test_a_kind_may_name_its_precision():
    assert split_kind("dense") == (False, "dense", None)
    assert split_kind("mh_moe@ternary") == (False, "mh_moe", "ternary")
    assert split_kind("mod") == (True, "dense", None)
    assert split_kind("mod+moe@ternary") == (True, "moe", "ternary")
    with pytest.raises(ConfigError, match=r"kinds=peer\+moe: only mod wraps blocks; write mod\+moe"):
        split_kind("peer+moe")
    with pytest.raises(ConfigError, match=r"^kinds=moe@ternery: 'ternery' is none of float, ternary; did you mean"):
        split_kind("moe@ternery")
    with pytest.raises(ConfigError, match="'' is none of float, ternary"):
        split_kind("moe@")


def test_an_unknown_kind_is_refused_with_the_nearest_name():
    known = ", ".join(["dense", "mod", *SIZES])
    with pytest.raises(ConfigError, match=rf"kinds=peeer is none of {known}; did you mean 'peer'\?"):
        sized_ffn("peeer", dense_at(64), 64, 128)


@pytest.mark.parametrize(("kind", "d_model", "d_ff"), [("pkm", 2, 1), ("moe", 8, 2), ("mh_moe", 8, 4), ("peer", 2, 1)])
def test_a_model_too_narrow_to_be_matched_is_refused(kind, d_model, d_ff):
    with pytest.raises(ConfigError, match=r"cannot be sized to the dense layer's .* widen the model or its d_ff"):
        sized_ffn(kind, DenseConfig(d_ff=d_ff), d_model, 128)


def test_heads_that_cannot_split_the_width_are_refused():
    with pytest.raises(ConfigError, match="kind=mh_moe needs an even d_model, not 33"):
        sized_ffn("mh_moe", DenseConfig(d_ff=88), 33, 128)


@pytest.mark.parametrize("d_model", WIDTHS)
def test_mod_wraps_every_other_block_and_its_predictor_is_cheap(d_model):
    wrap = mod_wrap(d_model)
    assert wrap.pop("at") == "every-2" and wrap["capacity"] == 0.125
    mixer = {"kind": "attention", "num_heads": 4}
    inner = {"kind": "block", "mixer": mixer, "ffn": dense_at(d_model).model_dump()}
    wrapped = LayerConfig.model_validate({**wrap, "inner": inner}).cost(d_model, 128)
    assert wrapped.items["predictor"] < 0.03 * LayerConfig.model_validate(inner).cost(d_model, 128).flops


@pytest.mark.parametrize("kind", [*SIZES, "dense", "attention", "block", "mod"])
def test_there_is_an_example_of_every_kind(kind):
    assert example(kind, 64, 128).kind == kind
