"""PEER's tables and figures from made runs: planted orders are found, reversed ones too, none where there is none."""

from functools import cache
from itertools import pairwise
from math import exp, log2

import numpy as np
import pytest
from made_runs import made_run

from sparsemix.config import config_hash
from sparsemix.layers import PEERConfig
from sparsemix.reproduce import peer_experts, peer_granularity, peer_heads, peer_isoflop, peer_norm
from sparsemix.reproduce.base import SCALES, Lab
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.lab import ReproduceConfig, plan, reproduction
from sparsemix.reproduce.peer import layer, methods
from sparsemix.sweep.arms import backbone, run_config

NO, YES, UNCLEAR = "not reproduced", "reproduced", "not resolved at this scale"
SEEDS = 4
# Of a seed, shared by all arms, and of a run.
SHARED, OWN = 0.005, 0.002


def noise(arm, seed):
    shared = np.random.default_rng(seed).normal(0, SHARED)
    return shared + np.random.default_rng([seed, *arm.encode()]).normal(0, OWN)


@cache
def planned(name):
    return plan(name, ReproduceConfig(seeds=SEEDS))


def lab_of(tmp_path, name, loss, routing=lambda arm, config: None):
    """Made runs of a design without a grid; loss(arm, ffn of the middle block)."""
    runs = {}
    for cell in planned(name).cells:
        middle = cell.config.model.blocks[1].ffn
        nats = 4 + loss(cell.arm, middle) + noise(cell.arm, cell.config.seed)
        made = made_run(tmp_path, cell.arm, cell.config, nats, routing=routing(cell.arm, cell.config))
        runs.setdefault(cell.arm, []).append(made)
    return Lab(SCALES["demo"], tmp_path, runs, lambda _: None)


def outcomes(outcome):
    return [trend.outcome for trend in outcome.trends]


def pools(sign):
    return lambda arm, ffn: sign * -0.02 * log2(ffn.num_experts / 64) if isinstance(ffn, PEERConfig) else 0


def used(arm, config):
    """Use that batch norm makes more even, and that every expert of a pool gets at 40,000 tokens."""
    for i, block in enumerate(config.model.blocks):
        if isinstance(block.ffn, PEERConfig):
            kl = 0.1 * log2(block.ffn.n) * (1 if block.ffn.query_norm == "batch" else 1.5)
            kl += 0.01 * np.random.default_rng([config.seed, *arm.encode()]).normal()
            return {f"blocks.{i}.ffn": {"usage": 1.0, "unevenness": kl, "tokens": 40_000}}
    return None


@pytest.mark.parametrize(("sign", "said"), [(1, [YES] * 4), (-1, [NO] * 4), (0, [UNCLEAR] * 4)])
def test_a_growing_pool_lowers_raises_or_leaves_the_loss(tmp_path, sign, said):
    found = peer_experts.pools_outcome(lab_of(tmp_path, "peer-fig3a", pools(sign)))
    assert outcomes(found) == said
    rows = found.tables[0].rows
    assert [row[0].split("²")[0] for row in rows] == ["Dense", "16", "32", "64", "128"]
    assert [row[7] for row in rows] == ["24.17", "23.46", "22.54", "21.47", "20.64"]
    assert [x for x, _ in found.figures[0].lines[0].points] == [256, 1024, 4096, 16384]


def test_table_2_has_the_papers_rows_and_counts_its_tokens(tmp_path):
    found = peer_experts.norm_outcome(lab_of(tmp_path, "peer-table2", pools(1), used))
    rows = {row[0]: row[1:] for row in found.tables[0].rows}
    assert rows["unevenness, KL in nats, paper"] == ["0.45", "0.30", "0.63", "0.44", "0.97", "0.66", "1.52", "1.06"]
    assert rows["expert usage, %, paper"][-2:] == ["99.8", "100.0"]
    assert all(cell.startswith("100.0") for cell in rows["expert usage, %"])
    # 10 * 128² / (2 * 8).
    assert rows["evaluation tokens needed"][-1] == "10.2\u00a0k"
    assert outcomes(found) == [YES, UNCLEAR, YES, YES, YES]


def test_heads_and_picks_are_told_apart(tmp_path):
    paper = entry("peer-fig3b").numbers["perplexity"]

    def published(arm, ffn):
        # The paper's own numbers, above the noise: our grid halves heads and their picks.
        return 4 * np.log(paper[4 * ffn.num_heads * ffn.top_k][2 * ffn.num_heads] / 20)

    found = peer_heads.outcome(lab_of(tmp_path, "peer-fig3b", published))
    assert outcomes(found) == [YES, YES, YES]
    ours, theirs = ([[cell.endswith("*") for cell in row] for row in table.rows] for table in found.tables)
    assert ours == [row[:5] for row in theirs[:4]]
    flat = peer_heads.outcome(lab_of(tmp_path / "flat", "peer-fig3b", lambda arm, ffn: 0))
    assert outcomes(flat) == [UNCLEAR] * 3
    against = peer_heads.outcome(lab_of(tmp_path / "against", "peer-fig3b", lambda *at: -published(*at)))
    assert outcomes(against) == [NO, NO, NO]


@cache
def width_of(width):
    return backbone(f"peer-dense:{SCALES['demo'].size}", SCALES["demo"].overrides, width)


def curves(tmp_path, arms, best, budgets=(1e11, 3e11)):
    """Made runs of a grid: parabolas in the logarithm of FLOPs with these least losses, seeds at the middle size."""
    data = planned("peer-fig3a").cells[0].config.data
    runs = {}
    for i, budget in enumerate(budgets):
        for arm in arms:
            for width in (16, 20, 24, 32, 40, 48):
                for seed in range(SEEDS if width == 24 else 1):
                    config = run_config(arm, width_of(width), data, budget, seed)
                    flops = config.model.cost().flops / config.model.seq_len
                    nats = (
                        4
                        - 0.2 * i
                        + best[arm.name]
                        + 0.1 * log2(flops / 1.1e5) ** 2
                        + noise(f"{arm.name} {width}", seed)
                    )
                    role = "seed" if seed else "grid"
                    made = made_run(tmp_path, arm.name, config, nats, role, lookahead=-0.03)
                    runs.setdefault(arm.name, []).append(made)
    return Lab(SCALES["demo"], tmp_path, runs, lambda _: None)


PUBLISHED = {"Dense": 0.0, "MoE": -0.09, "PKM": -0.07, "PEER": -0.12}
REVERSED = {"Dense": -0.12, "MoE": -0.07, "PKM": -0.05, "PEER": 0.0}


@pytest.mark.parametrize(("best", "said"), [(PUBLISHED, YES), (REVERSED, NO), (dict.fromkeys(PUBLISHED, 0.0), UNCLEAR)])
def test_figure_1_orders_the_methods_at_their_optima(tmp_path, best, said):
    budgets = (1e11, 3e11) if said == YES else (1e11,)
    found = peer_isoflop.outcome(curves(tmp_path, methods(SCALES["demo"]), best, budgets))
    assert outcomes(found) == [said] * 5 * len(budgets)
    rows = found.tables[0].rows
    assert [row[1] for row in rows] == ["Dense", "MoE", "PKM", "PEER"] * len(budgets)
    assert [row[10] for row in rows[:4]] == ["L10", "L8", "L7", "L7"]
    values = [float(row[6]) for row in rows[:4]]
    wanted = [exp(best[row[1]] - best["Dense"]) for row in rows[:4]]
    assert values == pytest.approx(wanted, abs=0.01)
    # By the top-k of training alone where experts choose: fewer nats.
    assert [row[7] != "–" for row in rows[:4]] == [False, True, False, False]
    assert float(rows[1][7]) < float(rows[1][4])
    if said == YES:
        # The fitted optimum with its intervals is what is drawn and printed.
        assert all(line.star for figure in found.figures for line in figure.lines)
        assert all(row[3].startswith("[") and row[5].startswith("[") for row in rows)
    assert len(found.figures) == len(budgets) and all(len(figure.lines) == 4 for figure in found.figures)


@pytest.mark.parametrize(("shift", "said"), [(-0.05, YES), (0.05, NO), (0.0, UNCLEAR)])
def test_figure_4_compares_both_curves(tmp_path, shift, said):
    arms = plan_arms("peer-fig4")
    lab = curves(tmp_path, arms, {peer_norm.WITH: shift, peer_norm.WITHOUT: 0.0}, (1e11,))
    found = peer_norm.outcome(lab)
    assert outcomes(found) == [said, said]
    assert [row[0] for row in found.tables[0].rows] == ["16", "20", "24", "32", "40", "48"]
    assert len(found.tables[1].rows) == 10


def plan_arms(name):
    return reproduction(name).design(SCALES["demo"]).arms


def test_both_curves_and_both_pools_share_their_runs():
    shared = [{cell.run for cell in plan(name, ReproduceConfig()).cells} for name in ("peer-fig3a", "peer-table2")]
    assert len(shared[0] & shared[1]) == 4 * SCALES["demo"].seeds
    raw = width_of(24)
    data = planned("peer-fig3a").cells[0].config.data
    of_norm, of_methods = plan_arms("peer-fig4")[0], plan_arms("peer-fig1")[-1]
    assert run_config(of_norm, raw, data, 1e11) == run_config(of_methods, raw, data, 1e11)


def test_the_papers_scale_is_the_published_setting():
    cells = plan("peer-fig3a", ReproduceConfig(scale="paper")).cells
    largest = next(cell.config for cell in cells if cell.arm == "1024² experts")
    ffn = largest.model.blocks[4].ffn
    assert (ffn.num_experts, ffn.num_heads, ffn.top_k, ffn.d_key) == (1024**2, 8, 16, 256)
    assert (largest.model.d_model, len(largest.model.blocks), largest.batch_size) == (1024, 8, 128)
    # Read off the paper's figure: 2.28 billion, to two digits.
    assert largest.model.cost().params == pytest.approx(2.28e9, rel=0.01)
    moe = run_config(methods(SCALES["paper"])[1], backbone("peer-dense:L8"), largest.data, 6e18).model.blocks[4].ffn
    assert (moe.num_experts, moe.d_ff, moe.capacity_factor) == (128, 4096, 1.0)


def test_what_replaces_the_dense_layer_costs_half_to_one_and_a_half_of_it():
    data = planned("peer-fig3a").cells[0].config.data
    for width in (24, 32, 40, 48):
        layers = [
            config.model.blocks[len(config.model.blocks) // 2].ffn.cost(width, config.model.seq_len).flops
            for config in (run_config(arm, width_of(width), data, 1e13) for arm in methods(SCALES["demo"]))
        ]
        assert all(0.38 < flops / layers[0] < 1.45 for flops in layers)


def test_a_narrowed_backbone_is_the_curves_own():
    size, overrides = peer_experts.one_size(SCALES["laptop"])
    assert backbone(f"peer-dense:{size}", overrides) == backbone(f"peer-dense:{size}", (), 48)


def test_the_layer_is_found_where_it_stands(tmp_path):
    lab = lab_of(tmp_path, "peer-fig3a", pools(0))
    path, settings = layer(lab.runs["64² experts"][0])
    assert path == "blocks.1.ffn" and settings["num_experts"] == 64**2
    sides = [layer(lab.runs[f"{side}² experts"][0])[1]["num_experts"] for side in peer_experts.SIDES["demo"]]
    assert all(b == 4 * a for a, b in pairwise(sides))


@pytest.mark.parametrize(("g", "said"), [(4, YES), (-4, NO), (0, UNCLEAR)])
def test_granularity_feeds_its_law(tmp_path, g, said):
    design = reproduction("peer-granularity").design(SCALES["demo"])
    data, runs = planned("peer-fig3a").cells[0].config.data, {}
    for arm in design.arms:
        for width in design.sizes:
            for budget in design.budgets:
                config = run_config(arm, width_of(width), data, budget)
                params = config.model.cost().params - config.model.vocab_size * width
                ffn = config.model.blocks[len(config.model.blocks) // 2].ffn
                tokens = config.steps * config.batch_size * config.model.seq_len
                law = (g / (ffn.num_heads * ffn.top_k) ** 0.6 + 9) / params**0.15 + 40 / tokens**0.3
                # More experts cost tokens: only a flat law leaves the loss at equal FLOPs alone.
                nats = 2 + (law if g else 1)
                nats += 0.2 * noise(f"{arm.name} {width} {budget}", 0)
                runs.setdefault(arm.name, []).append(made_run(tmp_path, arm.name, config, nats))
    found = peer_granularity.outcome(Lab(SCALES["demo"], tmp_path, runs, lambda _: None))
    assert outcomes(found)[0] == said
    assert [row[0] for row in found.tables[1].rows] == ["a", "alpha", "b", "beta", "g", "gamma", "c"]
    assert len(found.tables[0].rows) == 8 and all(len(row) == 6 for row in found.tables[0].rows)
    if g > 0:
        assert outcomes(found)[1] == YES and found.numbers["laws"][0]["num_runs"] == 32


def test_granularity_has_the_runs_of_figure_3b():
    design = reproduction("peer-granularity").design(SCALES["demo"])
    of_heads = planned("peer-fig3b").cells
    data = of_heads[0].config.data
    mine = {config_hash(run_config(arm, width_of(32), data, max(design.budgets))) for arm in design.arms}
    assert len(mine) == 4 and mine <= {cell.run for cell in of_heads}
