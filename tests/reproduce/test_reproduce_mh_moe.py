"""The tables of MH-MoE from made runs: planted orders are found, reversed ones too, none where there is none."""

import math
from functools import cache

import numpy as np
import pytest

from sparsemix.layers import DenseConfig, MHMoEConfig, MoEConfig
from sparsemix.report.records import Record
from sparsemix.reproduce import mh_moe_activation, mh_moe_heads, mh_moe_parts
from sparsemix.reproduce.base import SCALES, Lab
from sparsemix.reproduce.lab import ReproduceConfig, plan, reproduction
from sparsemix.reproduce.mh_moe_arms import DENSE, FINE, H2, H3, M2, M3, SMOE
from sparsemix.reproduce.mh_moe_tables import at_half, loss_table

NO, YES, UNCLEAR = "not reproduced", "reproduced", "not resolved at this scale"
SEEDS, DOCS, BYTES_PER_TOKEN = 4, 30, 2.5
PUBLISHED = plan("mhmoe-table1", ReproduceConfig(scale="paper"))


@cache
def planned(name):
    return plan(name, ReproduceConfig(seeds=SEEDS))


def made_run(out, cell, nats, experts=None):
    """A record with a test loss of `nats` per token; documents differ alike in all runs, and a little in each."""
    folder = out / "runs" / f"{cell.run}"
    folder.mkdir(parents=True, exist_ok=True)
    own = np.random.default_rng([cell.config.seed, *cell.arm.encode()])
    each = nats + np.random.default_rng(cell.config.seed).normal(0, 0.1, DOCS) + own.normal(0, 0.001, DOCS)
    num_bytes = np.full(DOCS, 1000)
    np.savez(folder / "documents.npz", ids=np.arange(DOCS), nats=each * 1000 / BYTES_PER_TOKEN, bytes=num_bytes)
    bpb, costs, flops = each.mean() / BYTES_PER_TOKEN / math.log(2), cell.config.costs(), cell.config.train.budget_flops
    return Record(
        folder=folder, arm=cell.arm, role="grid", budget=flops, flops=flops, seed=cell.config.seed,
        lr=cell.config.train.lr, params=costs["params"], active_params=1, forward_flops=costs["flops_per_token"],
        tokens=cell.config.steps * 512, nats=float(each.mean()), bpb=float(bpb), validation_bpb=float(bpb),
        lookahead_bpb=None, wall_s=1.0, tokens_per_s=1.0, peak_memory_bytes=1,
        curve=((flops / 4, 1.0, 4.0), (flops / 2, 2.0, 3.5), (flops, 4.0, float(bpb))),
        settings=cell.config.model_dump(mode="json"),
        result={"routing": {"experts": experts or {}}, "convention": "made"},
    )  # fmt: skip


def lab_of(out, name, loss, experts=lambda cell: None):
    """Made runs of a name's design; loss(arm) in nats per token."""
    runs = {}
    for cell in planned(name).cells:
        runs.setdefault(cell.arm, []).append(made_run(out, cell, 4 + loss(cell.arm), experts(cell)))
    return Lab(SCALES["demo"], out, runs, lambda _: None)


def outcome(name, lab):
    return reproduction(name).outcome(lab)


def outcomes(found):
    return [trend.outcome for trend in found.trends]


def places(*order):
    return lambda arm: -0.02 * order.index(arm)


ORDER = (DENSE, SMOE, FINE, M2, M3, H2, H3)
TABLES = ("mhmoe-table1", "mhmoe-table2", "mhmoe-table3")


@pytest.mark.parametrize("name", TABLES)
def test_the_order_of_the_papers_models_is_found_reversed_or_left_open(name, tmp_path):
    assert set(outcomes(outcome(name, lab_of(tmp_path, name, places(*ORDER))))) == {YES}
    assert set(outcomes(outcome(name, lab_of(tmp_path, name, places(*reversed(ORDER)))))) == {NO}
    undecided = outcome(name, lab_of(tmp_path, name, lambda arm: 0))
    assert set(outcomes(undecided)) == {UNCLEAR}
    assert all("could have seen" in trend.evidence for trend in undecided.trends)


def test_one_seed_resolves_nothing(tmp_path):
    lab = lab_of(tmp_path, "mhmoe-table1", places(*ORDER))
    first = Lab(lab.scale, tmp_path, {arm: runs[:1] for arm, runs in lab.runs.items()}, print)
    assert {trend.evidence for trend in outcome("mhmoe-table1", first).trends} == {
        "one seed cannot tell a kind from its luck"
    }


def test_table_1_has_the_papers_rows_and_columns_and_its_effects(tmp_path):
    corpora, losses, effects = outcome("mhmoe-table1", lab_of(tmp_path, "mhmoe-table1", places(*ORDER))).tables
    assert corpora.columns[1:4] == ["50k RedPajama", "50k Wiki", "50k C4"]
    rows = {row[0]: list(row[1:]) for row in corpora.rows}
    assert [row[0] for row in corpora.rows][:4] == ["Dense, here", "Dense, paper", "SMoE, here", "SMoE, paper"]
    assert rows["MH-MoE h=3, paper"] == ["11.45", "10.00", "14.90", "10.51", "9.18", "13.63"]
    assert rows["MH-MoE h=3, here"] == ["–"] * 3 + ["no data here"] * 3
    assert f"{M3}, here" in rows and f"{M3}, paper" not in rows
    half = losses.columns.index("half of training: validation bits per byte")
    assert {row[half] for row in losses.rows} == {"3.5000 ± 0.0000"}
    found = {row[0]: row[1:] for row in effects.rows}
    # ln(10.51 / 10.90), and the planted 0.1 nats between their places.
    assert found[f"{H3} minus {SMOE}"][3] == "−0.0364"
    assert found[f"{H3} minus {SMOE}"][0] == "−0.1000" or abs(float(found[f"{H3} minus {SMOE}"][0][1:]) - 0.1) < 2e-3
    assert float(found[f"{H2} minus {FINE}"][2]) > 0


def test_half_of_training_needs_an_evaluation_near_it(tmp_path):
    record = made_run(tmp_path, planned("mhmoe-table1").cells[0], 4.0)
    assert at_half(record) == 3.5
    late = Record(**{**record.__dict__, "curve": ((record.flops, 1.0, 3.0),)})
    assert at_half(late) is None
    assert loss_table("", {"a": [late]}).rows[0][1] == "–"


def ffn(config):
    return config.model.blocks[1].ffn


def test_at_the_published_width_the_layers_are_the_published_ones():
    found = {cell.arm: ffn(cell.config) for cell in PUBLISHED.cells}
    assert all(isinstance(cell.config.model.blocks[0].ffn, DenseConfig) for cell in PUBLISHED.cells)
    sizes = {arm: (c.num_experts, c.top_k, c.d_ff) for arm, c in found.items() if isinstance(c, MoEConfig)}
    assert sizes == {SMOE: (8, 1, 2048), FINE: (16, 2, 1024)}
    heads = {
        arm: (c.num_heads, c.inner.num_experts, c.inner.top_k, c.inner.d_ff)
        for arm, c in found.items()
        if isinstance(c, MHMoEConfig)
    }
    assert heads == {H2: (2, 40, 2, 768), H3: (3, 96, 3, 512), M2: (2, 62, 3, 512), M3: (3, 93, 3, 512)}
    assert {cell.config.train.lr for cell in PUBLISHED.cells} == {6e-4}
    assert all(abs(cell.config.steps - 100_000) < 200 for cell in PUBLISHED.cells)


def spent(cell):
    """FLOPs of a token without the router's, and parameters without the router's."""
    model, router_params = cell.config.model, 0
    for layer in (block.ffn for block in model.blocks):
        inner, heads = (layer.inner, layer.num_heads) if isinstance(layer, MHMoEConfig) else (layer, 1)
        router_params += getattr(inner, "num_experts", 0) * model.d_model // heads
    cost = model.cost()
    return (cost.flops - cost.items.get("router", 0)) / model.seq_len, cost.params - router_params


@pytest.mark.parametrize("name", ["mhmoe-table1", "mhmoe-heads"])
@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_all_models_spend_the_same_and_the_matched_ones_hold_the_same(name, scale):
    cells = {cell.arm: cell for cell in plan(name, ReproduceConfig(scale=scale)).cells}
    flops = {arm: spent(cell)[0] for arm, cell in cells.items()}
    assert len(set(flops.values())) == 1
    equal = [arm for arm in cells if "equal parameters" in arm]
    assert {spent(cells[arm])[1] for arm in equal} == {spent(cells[SMOE])[1]} and len(equal) in (2, 5)


def test_the_other_tables_use_table_1s_runs():
    runs = {cell.run for cell in planned("mhmoe-table1").cells}
    shared = {
        name: len({cell.arm for cell in planned(name).cells if cell.run in runs})
        for name in ("mhmoe-table4", "mhmoe-table5", "mhmoe-heads", "mhmoe-activation")
    }
    assert shared == {"mhmoe-table4": 2, "mhmoe-table5": 1, "mhmoe-heads": 3, "mhmoe-activation": 4}


def test_table_4_spends_the_same_within_a_group_for_the_same_steps():
    cells = {cell.arm: cell for cell in planned("mhmoe-table4").cells}
    groups = [[cells[arm] for arm in cells if (mh_moe_parts.WITH in arm) == having] for having in (False, True)]
    without, having = ({spent(cell)[0] for cell in group} for group in groups)
    model = cells[SMOE].config.model
    # Two matrices of d_model by d_model in every second block.
    more = 2 * 2 * model.d_model**2 * len(model.blocks) // 2
    assert [len(without), len(having)] == [1, 1] and having.pop() - without.pop() == more
    assert len({cell.config.steps for cell in cells.values()}) == 1
    assert spent(cells[mh_moe_parts.WIDE])[1] == spent(cells[SMOE])[1]


def test_table_5_leaves_layers_out_for_the_same_steps():
    cells = {cell.arm: cell for cell in planned("mhmoe-table5").cells}
    assert len({cell.config.steps for cell in cells.values()}) == 1
    kept = {arm: (ffn(cell.config).head, ffn(cell.config).merge) for arm, cell in cells.items()}
    assert list(kept.values()) == [(False, False), (True, False), (False, True), (True, True)]
    flops = [spent(cell)[0] for cell in cells.values()]
    assert flops[0] < flops[1] == flops[2] < flops[3]


GAINS = {H2: -0.06, SMOE: -0.01, FINE: -0.01}


def gains(sign):
    """Head and merge help the multi-head model most."""
    return lambda arm: sign * sum(GAINS[name] for name in GAINS if arm == f"{name}{mh_moe_parts.WITH}")


@pytest.mark.parametrize(("sign", "said"), [(1, YES), (-1, NO), (0, UNCLEAR)])
def test_what_head_and_merge_gain_is_compared_between_mixtures(sign, said, tmp_path):
    found = outcome("mhmoe-table4", lab_of(tmp_path, "mhmoe-table4", gains(sign)))
    assert outcomes(found) == [said] * 4
    rows = {row[0]: list(row[1:]) for row in found.tables[0].rows}
    assert rows["MH-MoE h=2, paper"] == ["11.71", "10.16", "15.23", "11.46", "9.98", "14.89"]
    assert rows["SMoE, here"] == ["no data here"] * 6


PARTS = (mh_moe_parts.NEITHER, mh_moe_parts.MERGE, mh_moe_parts.HEAD, H2)


@pytest.mark.parametrize(("loss", "said"), [(places(*PARTS), YES), (places(*PARTS[::-1]), NO), (lambda _: 0, UNCLEAR)])
def test_head_and_merge_are_told_apart(loss, said, tmp_path):
    found = outcome("mhmoe-table5", lab_of(tmp_path, "mhmoe-table5", loss))
    assert outcomes(found) == [said] * 5
    assert [row[0] for row in found.tables[0].rows][1::2] == [
        f"{arm}, paper" for arm in (PARTS[0], PARTS[2], PARTS[1], PARTS[3])
    ]


@pytest.mark.parametrize(("sign", "said"), [(1, YES), (-1, NO), (0, UNCLEAR)])
def test_more_heads_are_better_worse_or_the_same(sign, said, tmp_path):
    order = (SMOE, *mh_moe_heads.NAMES.values())
    found = outcome("mhmoe-heads", lab_of(tmp_path, "mhmoe-heads", lambda arm: -0.02 * sign * order.index(arm)))
    assert outcomes(found) == [said] * 6
    assert [x for x, _ in found.figures[0].lines[0].points] == [1, 2, 3, 4, 6]
    assert [row[1] for row in found.tables[2].rows] == ["14.82", "14.77", "12.87", "12.72", "12.41", "12.95", "13.28"]
    effects = {row[0]: row[4] for row in found.tables[1].rows}
    assert effects[f"{M2} minus {SMOE}"] == f"{math.log(12.87 / 14.82):+.4f}".replace("-", "−")
    assert effects[f"{M3} minus {SMOE}"] == "–"


def loads(skew):
    """Loads of a layer's experts, the more uneven the larger `skew(arm)` is, a little different in every seed."""

    def experts(cell):
        found = {}
        for i in range(1, len(cell.config.model.blocks), 2):
            layer = cell.config.model.blocks[i].ffn
            path, layer = (
                (f"blocks.{i}.ffn", layer) if isinstance(layer, MoEConfig) else (f"blocks.{i}.ffn.inner", layer.inner)
            )
            own = np.random.default_rng([cell.config.seed, i, *cell.arm.encode()]).normal(0, 0.05)
            load = np.exp(-(skew(cell.arm) + own) * np.arange(layer.num_experts) * 8 / layer.num_experts)
            found[path] = {"load": (load / load.sum()).tolist()}
        return found

    return experts


def test_activation_counts_experts_above_the_threshold_per_token_and_per_row(tmp_path):
    cell = next(c for c in planned("mhmoe-activation").cells if c.arm == mh_moe_activation.HEADS)
    load = np.full(32, 0.5 / 31)
    load[0] = 0.5
    record = made_run(tmp_path, cell, 4.0, {"blocks.1.ffn.inner": {"load": load.tolist()}})
    # Two picks a row and four rows a token: the rare experts have 0.129 picks a token and 0.032 a row.
    assert mh_moe_activation.active(record, 0.1) == 1
    assert mh_moe_activation.active(record, 0.1, per_row=True) == 1 / 32
    assert mh_moe_activation.active(record, 0.13) == 1 / 32
    assert mh_moe_activation.active(record, 0.03, per_row=True) == 1


@pytest.mark.parametrize(("skews", "said"), [((1.5, 0.1), YES), ((0.1, 3.0), NO)])
def test_activation_of_experts_is_larger_or_smaller(skews, said, tmp_path):
    others = (SMOE, FINE, mh_moe_activation.SPARSE)
    lab = lab_of(tmp_path, "mhmoe-activation", lambda _: 0, loads(lambda arm: skews[arm not in others]))
    found = outcome("mhmoe-activation", lab)
    assert outcomes(found)[3:] == [said] * 3
    rows = {row[0]: row[1:] for row in found.tables[0].rows}
    assert rows["paper, MH-MoE"][-2] == "90.71\u00a0%" and rows[mh_moe_activation.HEADS][:2] == ["32", "4"]
    assert len(found.figures) == 2 and len(found.figures[0].lines) == 6


def test_equal_loads_look_active_per_token_alone(tmp_path):
    """Where routing is alike, heads make the paper's metric rise by themselves."""
    lab = lab_of(tmp_path, "mhmoe-activation", lambda _: 0, loads(lambda _: 1.0))
    found = outcomes(outcome("mhmoe-activation", lab))
    assert found[0] == YES and found[3] == UNCLEAR
