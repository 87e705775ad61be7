"""The runs that stand for an arm at a budget: verdict, table, chart, page, study and reproductions take the same."""

from statistics import fmean

import pytest
from made_records import MOD, Law, made_record
from test_study_page import page_of

from sparsemix.report import study_losses, study_tables
from sparsemix.report.fits.curves import standing_runs
from sparsemix.report.isoflop import analyse
from sparsemix.report.optimum import by_size, standing
from sparsemix.report.plots import mean_line
from sparsemix.reproduce import mod_curves

BUDGET = 1e13
SIZES = [2e5 * 1.6**i for i in range(6)]
# A curve with its optimum between the third and the fourth size, nearer to the third.
LOSSES = [3.60, 3.54, 3.50, 3.503, 3.54, 3.60]
FALLING = [3.60 - 0.03 * i for i in range(6)]

# Of every case: the loss by size, how many seeds each size has that ended, and the size that stands.
CASES = {
    "seeds next to the optimum": (LOSSES, [1, 1, 4, 1, 1, 1], 2),
    "seeds one size beside it": (LOSSES, [1, 1, 1, 4, 1, 1], 3),
    "seeds far from it": (LOSSES, [3, 1, 1, 1, 1, 1], 0),
    "as many seeds everywhere": (LOSSES, [2] * 6, 2),
    "as many seeds everywhere, the least loss by luck": ([3.56, 3.52, 3.503, 3.501, 3.58, 3.66], [2] * 6, 2),
    "equal seeds at two sizes": (LOSSES, [1, 3, 1, 1, 3, 1], 1),
    "the least loss at the largest size": (FALLING, [1] * 6, 5),
    "the least loss at the largest, the seeds elsewhere": (FALLING, [1, 1, 3, 1, 1, 1], 2),
    "too few sizes for a curve": (LOSSES[:2], [2, 2], 1),
    "equal losses of all sizes": ([3.5] * 3, [2, 2, 2], 0),
    "seeds that failed": (LOSSES, [1, 1, 1, 2, 1, 1], 3),
    "the best size failed": (LOSSES, [1, 1, 0, 1, 1, 1], 3),
}


def runs_of(arm, losses, seeds, law):
    """The runs that ended; another seed is worse by a thousandth, so that the least loss of a run is no rule."""
    for size, nats, ended in zip(SIZES, losses, seeds, strict=False):
        for seed in range(ended):
            yield made_record(arm, BUDGET, size, seed, nats + 0.001 * seed, law, "seed" if seed else "grid")


def study(losses, seeds):
    base = list(runs_of("dense", LOSSES, [2] * 6, Law()))
    # Learning rates that were tried have the least loss of all, and stand for nothing.
    tried = [made_record("mod", BUDGET, SIZES[0], 9, 3.0, MOD, "rate", lr=rate) for rate in (1e-3, 2e-3)]
    return base, [*runs_of("mod", losses, seeds, MOD), *tried]


@pytest.mark.parametrize("case", CASES)
def test_verdict_table_chart_page_study_and_reproduction_show_the_same_runs(case, tmp_path):
    losses, seeds, wanted = CASES[case]
    base, arm = study(losses, seeds)
    records = [*base, *arm]
    analysis = analyse(records, resamples=50)
    stands = standing_runs(records)
    own, others = stands["mod", BUDGET], stands["dense", BUDGET]
    assert {run.params for run in own} == {round(SIZES[wanted])} and len(own) == seeds[wanted]
    names = [run.folder.name for run in own]

    # The reproductions, from the runs alone.
    assert mod_curves.at_optimum(arm, BUDGET) == own
    # The page: charts of losses against time, pictures of routing, and what `isoflop` inspects.
    shown = study_losses.runs_at_optimum(analysis, "mod", BUDGET)
    assert [run["folder"] for run in shown] == names
    assert study_losses.largest_optima(analysis)["mod"] == shown[0]
    _, page = page_of(analysis, records, tmp_path)
    assert f"runs/{names[0]} --show routing" in page.sections["routing"].replace('--prompt "..." ', "")
    (chart,) = (drawn.shape for drawn in study_losses.against_time(analysis))
    line = next(line for line in chart.lines if line.name == "mod")
    drawn = mean_line("mod", 0, [sorted((wall, bpb) for _, wall, bpb in run.curve) for run in own])
    assert drawn is not None and line.points == drawn.points
    # The table, as Markdown has it too, and the verdict.
    (row,) = (row for row in study_tables.optima(analysis).rows if row[0] == "mod")
    assert row[5] == str(len(own)) and " | ".join(row) in study_tables.to_markdown(analysis)
    gap = next(q for q in analysis["quantities"] if q["arm"] == "mod")
    both = sorted({r.seed for r in own} & {r.seed for r in others})
    if len(both) >= 2:
        pairs = [{r.seed: r.bpb for r in runs} for runs in (own, others)]
        assert gap["gap_bpb"] == pytest.approx(fmean(pairs[0][s] - pairs[1][s] for s in both))


def test_seeds_far_from_the_optimum_are_warned_of():
    told = []
    for losses, seeds, _ in list(CASES.values())[:3]:
        base, arm = study(losses, seeds)
        warnings = analyse([*base, *arm], resamples=50)["warnings"]
        told.append(any("mod" in text and "not next to the optimum" in text for text in warnings))
    assert told == [False, False, True]


def test_a_run_that_is_size_and_seed_counts_once_and_sizes_of_equal_parameters_are_two():
    (grid,) = runs_of("moe", LOSSES[:1], [1], Law())
    (cheaper,) = runs_of("moe", LOSSES[:1], [1], Law(sparsity=2))
    again = made_record("moe", BUDGET, SIZES[0], 0, LOSSES[0], Law(), "seed")
    assert by_size([grid, again, cheaper]) == ((cheaper,), (grid,))


def test_of_sizes_that_are_equal_in_all_the_smaller_stands():
    sizes = by_size(runs_of("dense", [3.5, 3.5], [2, 2], Law()))
    assert standing(sizes, None) == sizes[0]
