"""Sizes by cost alone: around the predicted optimum, extended towards the lower loss."""

from itertools import islice, pairwise
from math import log

import pytest

from sparsemix.config import ConfigError
from sparsemix.sweep.ladder import (
    MIN_STEPS,
    TOKENS_PER_MAC,
    Rung,
    bottom,
    extension,
    ladder,
    predicted,
    ratio_of,
    rung,
    widths,
)

STEP_TOKENS = 512


def made(width):
    """A size whose cost grows with the cube of its width, as when depth grows with it."""
    flops = 3.0 * width**3
    return Rung(width, flops, int(flops / 2), 3 * flops * STEP_TOKENS, STEP_TOKENS)


RUNGS = [made(width) for width in islice(widths(), 25)]


def test_widths_are_spaced_evenly_and_heads_of_even_width_fit():
    found = list(islice(widths(), 25))
    assert found[:9] == [8, 12, 16, 24, 32, 48, 64, 96, 128]
    for small, large in pairwise(found):
        assert 1.3 < large / small <= 1.5 and large % 4 == 0


@pytest.mark.parametrize("budget", [1e12, 7e12, 1e14])
@pytest.mark.parametrize("num_sizes", [5, 6])
def test_a_ladder_is_neighbours_around_the_predicted_optimum(budget, num_sizes):
    found = ladder(RUNGS, budget, TOKENS_PER_MAC, num_sizes)
    sizes = [r.size for r in found]
    assert len(sizes) == num_sizes and sizes == [r.size for r in RUNGS if sizes[0] <= r.size <= sizes[-1]]
    target = log(predicted(budget))
    nearest = min(RUNGS, key=lambda r: abs(log(r.forward_flops) - target))
    assert nearest in found[1:-1]
    assert all(r.steps(budget) >= MIN_STEPS for r in found)


def test_the_predicted_size_trains_on_the_stated_tokens_and_the_rule_inverts():
    flops = predicted(1e13, 12.0)
    tokens = 1e13 / (3 * flops)
    assert tokens / (flops / 2) == pytest.approx(12.0)
    assert ratio_of(1e13, flops) == pytest.approx(12.0)


def test_sizes_with_too_few_steps_are_left_out_and_the_ladder_moves_down():
    budget = made(32).step_flops * (MIN_STEPS + 0.5)
    found = ladder(RUNGS, budget, 0.01, 5)
    assert found[-1].size == 32 and len(found) == 5


def test_a_budget_too_small_for_five_sizes_says_the_least_that_works():
    budget = made(16).step_flops * MIN_STEPS
    with pytest.raises(ConfigError, match=r"budgets=.* 5 sizes") as error:
        ladder(RUNGS, budget, TOKENS_PER_MAC, 5)
    least = float(str(error.value).split("as ")[1].split()[0])
    assert len(ladder(RUNGS, least, TOKENS_PER_MAC, 5)) == 5
    with pytest.raises(ConfigError):
        ladder(RUNGS, least * 0.99, TOKENS_PER_MAC, 5)


def valley(at, curvature=0.05):
    return lambda r: 2.0 + curvature * log(r.forward_flops / at) ** 2


def extended(loss, first, budget=1e13, most=20):
    tried = list(first)
    for _ in range(most):
        found = bottom({r.forward_flops: loss(r) for r in tried})
        beyond = extension(RUNGS, tried, budget, found.side) if found.side else None
        if beyond is None:
            return tried, found
        tried.append(beyond)
    raise AssertionError("the ladder was extended without end")


@pytest.mark.parametrize("size", [20, 32, 64, 128])
def test_a_ladder_is_extended_until_it_brackets_the_optimum_wherever_that_is(size):
    first = [made(width) for width in (40, 48, 64, 80, 96)]
    tried, found = extended(valley(made(size).forward_flops * 1.1), first)
    assert found.side == 0
    assert found.forward_flops == pytest.approx(made(size).forward_flops * 1.1)
    sizes = sorted(r.size for r in tried)
    assert sizes[0] < size < sizes[-1]
    added = [r.size for r in tried[5:]]
    assert all(a < 40 for a in added) if size < 40 else all(a > 96 for a in added)


def test_an_optimum_beyond_what_the_budget_pays_for_ends_the_ladder():
    budget = made(96).step_flops * (MIN_STEPS + 0.5)
    tried, found = extended(valley(made(300).forward_flops), [made(w) for w in (32, 48, 64)], budget)
    assert found.side == 1 and max(r.size for r in tried) == 96
    tried, found = extended(valley(made(4).forward_flops), [made(w) for w in (16, 24, 32, 48)])
    assert found.side == -1 and min(r.size for r in tried) == 8


def test_a_list_of_three_sizes_grows_to_the_five_that_a_curve_needs():
    tried, found = extended(valley(made(8).forward_flops / 2), [made(w) for w in (8, 12, 16)])
    assert found.side == -1 and [r.size for r in tried] == [8, 12, 16, 24, 32]
    tried, found = extended(valley(made(48).forward_flops), [made(w) for w in (32, 48, 64)])
    assert found.side == 0 and len(tried) == 5
    assert found.forward_flops == pytest.approx(made(48).forward_flops)


def test_sizes_far_from_the_best_do_not_move_the_vertex():
    skewed = {r.forward_flops: valley(made(64).forward_flops)(r) for r in RUNGS[2:14]}
    skewed[RUNGS[13].forward_flops] += 100.0
    assert bottom(skewed).forward_flops == pytest.approx(made(64).forward_flops)


def test_losses_without_a_minimum_go_on_at_their_lower_end():
    hill = {1.0: 2.0, 2.0: 2.1, 4.0: 2.2, 8.0: 2.15, 16.0: 2.1}
    assert bottom(hill).side == -1
    assert bottom({1 / f: loss for f, loss in hill.items()}).side == 1
    assert bottom({1.0: 2.0}).side != 0


def test_a_rung_costs_what_its_settings_cost():
    from sparsemix.data import DataConfig
    from sparsemix.sweep.arms import Arm, backbone, run_config

    config = run_config(Arm("moe", "moe"), backbone("tiny", (), 48), DataConfig(), 1e11)
    found = rung(48, config)
    assert found.steps(1e11) == config.steps
    assert found.forward_flops == pytest.approx(config.costs()["flops_per_token"])
    assert found.params == config.costs()["params"]
    assert found.tokens(1e11) == config.steps * config.batch_size * config.model.seq_len
