"""Mixture-of-Depths: what its reproductions compare costs what it should, and their claims follow the runs."""

import pytest
from made_mod_runs import made_seeds

from sparsemix.reproduce.base import SCALES, Lab
from sparsemix.reproduce.lab import reproduction
from sparsemix.reproduce.mod_arms import (
    DENSE,
    INTEGRATED,
    MOD,
    dropping,
    forward_flops,
    planned,
    shallower,
    without_predictor,
)
from sparsemix.reproduce.mod_experts import DROPS

TINY = SCALES["demo"]._replace(
    budget=2e8,
    budgets=(2e8,),
    overrides=(
        "model.d_model=32", "model.blocks.count=4", "model.blocks.each.mixer.num_heads=2",
        "model.blocks.each.ffn.d_ff=64", "model.vocab_size=300", "model.seq_len=32", "train.batch_tokens=64",
    ),
)  # fmt: skip
# Nats per token with which every claim of a reproduction holds.
PLANTED = {
    "mod-routing": {
        "dense": 3.1, "MoD 12.5 %": 3.0, "token choice 12.5 %": 3.05, "random 12.5 %": 3.2, "strided 12.5 %": 3.15,
        "MoD 12.5 %, every block": 3.3, "shallower dense": 3.25,
    },
    "mod-capacity": {"dense": 3.2, "MoD 50 %": 3.15, "MoD 25 %": 3.1, "MoD 12.5 %": 3.0, "MoD 6.25 %": 3.05},
    "mode-variants": {
        "dense": 3.3, "MoD 12.5 %": 3.25, "MoE": 3.2, "staged MoDE": 3.0, "integrated MoDE": 3.1, DROPS: 3.15,
    },
}  # fmt: skip


def lab_of(name, out, losses, seeds=4):
    """Runs of every arm of a design with these losses."""
    arms = reproduction(name).design(TINY).arms
    runs = {arm.name: made_seeds(out, arm, lambda arm: planned(TINY, arm), losses[arm.name], seeds) for arm in arms}
    return Lab(TINY, out, runs, lambda _: None)


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (lambda nats: nats, {"reproduced"}),
        (lambda nats: 6.5 - nats, {"not reproduced"}),
        (lambda nats: 3.1, {"not resolved at this scale"}),
    ],
    ids=["planted", "reversed", "equal"],
)
def test_claims_follow_the_losses(tmp_path, name, seen, said):
    lab = lab_of(name, tmp_path, {arm: seen(nats) for arm, nats in PLANTED[name].items()})
    outcome = reproduction(name).outcome(lab)
    assert {trend.outcome for trend in outcome.trends} == said
    for table in outcome.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    for figure in outcome.figures:
        assert figure.svg().startswith("<svg")


def test_one_seed_resolves_nothing(tmp_path):
    outcome = reproduction("mod-capacity").outcome(lab_of("mod-capacity", tmp_path, PLANTED["mod-capacity"], seeds=1))
    assert {trend.outcome for trend in outcome.trends} == {"not resolved at this scale"}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_controls_cost_per_token_what_they_are_compared_with(scale):
    control, mod = planned(scale, shallower(scale)), planned(scale, MOD)
    assert len(control.model.blocks) < len(mod.model.blocks)
    assert forward_flops(control) == pytest.approx(forward_flops(mod), rel=0.01)
    assert forward_flops(planned(scale, DENSE)) > 1.3 * forward_flops(mod)
    drops, integrated = planned(scale, dropping(scale)), planned(scale, INTEGRATED)
    assert forward_flops(drops) == pytest.approx(forward_flops(integrated), rel=0.01)
    assert drops.model.cost().params == pytest.approx(integrated.model.cost().params, rel=0.01)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_without_a_predictor_there_are_as_many_steps_for_fewer_flops(scale):
    without, with_it = planned(scale, without_predictor(scale)), planned(scale, MOD)
    assert without.steps == with_it.steps
    assert without.train.budget_flops < with_it.train.budget_flops
