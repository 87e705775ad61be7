"""How Mixture-of-Depths decides without later tokens: the predictor, its price, and the router's own cross-entropy."""

from collections.abc import Callable

from sparsemix.report.numbers import DASH, fixed, percent
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Design, Lab, Outcome, Reproduction, Scale
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.mod_arms import MOD, planned, router_bce, single, without_predictor
from sparsemix.reproduce.mod_identity import compare_bits, identity, identity_table
from sparsemix.reproduce.mod_progress import by_then, over_steps, progress_chart
from sparsemix.reproduce.mod_speed import Speed, step_times
from sparsemix.reproduce.mod_tables import by_seed, lookahead_nats, loss_table, percent_above, rates
from sparsemix.reproduce.tables import spread
from sparsemix.reproduce.trends import Test, bounded, estimated, judge

# The paper gives no weight. 1 is what public implementations take.
BCE = (router_bce(0.1), router_bce(1.0))
# Accurate "soon into training" is taken to be: after a quarter of the steps.
SOON = 0.25
# A step that takes less than this share longer is taken to have a negligible predictor.
NEGLIGIBLE = 0.05


def design(scale: Scale) -> Design:
    """MoD with its predictor, without one, and with the router's cross-entropy at two weights."""
    return single(scale, MOD, without_predictor(scale), *BCE)


def outcome(lab: Lab) -> Outcome:
    with_it, without = lab.runs[MOD.name], lab.runs["MoD 12.5 %, no predictor"]
    compared = [compare_bits(run, other) for run in with_it for other in without if run.seed == other.seed]
    speed = step_times(lab, {"predictor": planned(lab.scale, MOD), "none": planned(lab.scale, router_bce(0.0))})
    longer, interval = speed.ratio("predictor", "none")
    curves = [over_steps(run)["accuracy"] for run in with_it]
    tests = [
        *(_cost_claim(lab, arm.name) for arm in BCE),
        bounded(
            "the predictor's accuracy is 97 % or more", [100 * rates(r)["accuracy"] for r in with_it], 97, unit=" %"
        ),
        bounded(
            f"it is so soon into training (after {percent(SOON, 0)} of the steps, on training text)",
            [100 * by_then(curve, SOON) for curve in curves],
            97,
            unit=" %",
        ),
        bounded(
            "not in the paper: it is more accurate than always answering skip",
            [100 * (rates(r)["accuracy"] - rates(r)["always_skip"]) for r in with_it],
            0,
            unit=" points",
        ),
        estimated(
            f"the predictor's share of a step is negligible (the step takes less than {percent(NEGLIGIBLE, 0)} longer)",
            longer,
            interval,
            high=1 + NEGLIGIBLE,
        ),
    ]
    trends = [*judge(tests), identity("training is the same with and without the predictor", compared)]
    paper = entry("mod-sampling").numbers
    losses = loss_table("Loss by the rule for sampling", lab.runs, paper["says"], "the paper")
    tables = [losses, _cost_table(lab), _rates_table(lab), identity_table(compared), _speed_table(lab, speed)]
    skip = 1 - rates(with_it[0])["capacity"]
    charts = [chart for chart in [progress_chart(with_it, skip)] if chart is not None]
    numbers = {
        "bce_percent": {arm.name: _cost(lab, arm.name, lookahead_nats) for arm in BCE},
        "test_rates": {arm: [rates(r) for r in runs] for arm, runs in lab.runs.items()},
        "identity": [pair._asdict() for pair in compared],
        "step_time_ratio": {"estimate": longer, "interval": interval, "hardware": speed.hardware},
    }
    return Outcome(tables, trends, charts, _notes(), numbers)


def _notes() -> list[str]:
    return [
        "The paper gives no weight of the cross-entropy: 0.1 is our default, 1 what public implementations take.",
        "Losses under the top-k are what training lowers, and no likelihoods; the others are causal.",
        "Without a predictor the causal rule is a running threshold, which trains nothing.",
        "Accuracy alone flatters: as most tokens are skipped, always answering skip is right for all of them.",
    ]


def _cost(lab: Lab, arm: str, loss: Callable[[Record], float]) -> list[float]:
    """Per cent that a loss is above that of the predictor's runs, a value a seed."""
    return by_seed(lab.runs[arm], lab.runs[MOD.name], percent_above(loss))


def _cost_claim(lab: Lab, arm: str) -> Test:
    words = f"{arm.removeprefix('MoD 12.5 %, ')} costs 0.2 to 0.3 % of the training objective (0.15 to 0.35 unrounded)"
    return bounded(words, _cost(lab, arm, lookahead_nats), 0.15, 0.35, " %")


def _cost_table(lab: Lab) -> TextTable:
    rows = []
    for arm in BCE:
        objective, causal = (_cost(lab, arm.name, loss) for loss in (lookahead_nats, lambda r: r.nats))
        rows.append([arm.name, spread(objective, 2), spread(causal, 2), entry("mod-sampling").numbers["bce_percent"]])
    columns = ("arm", "under the top-k (%)", "causal (%)", "paper (%)")
    return TextTable("Loss of the router's cross-entropy above that of the predictor, by seed", columns, rows)


def _rates_table(lab: Lab) -> TextTable:
    """How well each rule knows the top-k, in per cent, on test text and over training."""
    columns = [
        "arm",
        "accuracy",
        "always skip",
        "precision",
        "recall",
        "routed",
        *(f"accuracy at {percent(s, 0)}" for s in (0.1, 0.25, 1)),
    ]
    rows = []
    for arm, runs in lab.runs.items():
        found = [rates(run) for run in runs if rates(run)]
        if not found:
            continue
        names = ("accuracy", "always_skip", "precision", "recall", "routed_rate")
        cells = [spread([100 * rate[name] for rate in found], 1) for name in names]
        curves = [over_steps(run).get("accuracy", []) for run in runs]
        seen = [spread([100 * by_then(c, share) for c in curves if c], 1) for share in (0.1, 0.25, 1)]
        rows.append([arm, *cells, *seen])
    rows.append(["paper", entry("mod-sampling").numbers["accuracy_percent"], *[DASH] * 7])
    return TextTable(
        "Causal rule against the top-k (%), means over layers; the last three on training text", columns, rows
    )


def _speed_table(lab: Lab, speed: Speed) -> TextTable:
    """Milliseconds of a step, and the share that FLOPs alone would give."""
    with_it, without = (planned(lab.scale, arm) for arm in (MOD, router_bce(0.0)))
    rows = [[name, fixed(1000 * speed.median(name), 2), str(len(times))] for name, times in speed.seconds.items()]
    share = percent(with_it.step_flops / without.step_flops - 1, 1)
    ratio, (low, high) = speed.ratio("predictor", "none")
    times = f"{percent(ratio - 1)} [{percent(low - 1)}, {percent(high - 1)}]"
    rows.append(["predictor's share", f"{times}; of the FLOPs {share}", DASH])
    return TextTable(f"Time of a training step by turns, on {speed.hardware}", ("model", "median (ms)", "steps"), rows)


REPRODUCTIONS = {"mod-sampling": Reproduction(design, outcome)}
