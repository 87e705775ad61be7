"""What equal loss costs: FLOPs per forward pass, the budget and the time the baseline would need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sparsemix.report.fits.curves import Curve
from sparsemix.report.fits.gaps import Gap
from sparsemix.report.optimum import size_of
from sparsemix.report.records import Record
from sparsemix.report.stats import Interval

# Budgets this many times beyond those that were run are extrapolated, and said to be.
FAR_BUDGET = 3.0
FLOOR = 0.7
# An interval is given if at least this share of the draws has the quantity at all.
REACHES = 0.975


@dataclass(frozen=True)
class Optimum:
    """A curve's optimum with draws of what the data leave open: vertex (a size), nats, and the curvature c."""

    curve: Curve
    vertex: float
    nats: float
    c: float
    vertices: Float[np.ndarray, "R"]
    levels: Float[np.ndarray, "R"]
    curvatures: Float[np.ndarray, "R"]


def optimum_of(curve: Curve, rng: np.random.Generator, resamples: int) -> Optimum | None:
    """Draws of the optimum; of those that do not turn upwards the vertex is nan. None if there is no optimum."""
    fit = curve.optimum
    if fit is None:
        return None
    coefs = fit.draws(rng, resamples)
    c = np.where(coefs[:, 2] > 0, coefs[:, 2], np.nan)
    vertices = fit.centre - coefs[:, 1] / (2 * c)
    if fit.at is None:
        levels = coefs[:, 0] - coefs[:, 1] ** 2 / (4 * c)
    else:
        mean, se, df = fit.level
        levels = mean + se * rng.standard_t(df, resamples) - c * (fit.at - vertices) ** 2
    return Optimum(curve, fit.vertex, fit.minimum[0], float(fit.coef[2]), vertices, levels, c)


def vertex_gap(arm: Optimum, base: Optimum, gap: Gap, rng: np.random.Generator) -> tuple[float, Float[np.ndarray, "R"]]:
    """(nats of the arm's optimum minus the baseline's, draws of it): paired where the gap is, so that what the seeds
    share cancels, and moved from the sizes with the seeds to the optima."""
    if gap.seeds < 2 or not gap.difference.interval.seeds_seen:
        return arm.nats - base.nats, arm.levels - base.levels
    sides = [(side, size_of(side.curve.seeded[0])) for side in (arm, base)]
    above = [side.c * (x - side.vertex) ** 2 for side, x in sides]
    drawn = [side.curvatures * (x - side.vertices) ** 2 for side, x in sides]
    interval = gap.difference.interval
    estimate = interval.estimate / arm.curve.bpb
    draws = estimate + _drawn(interval, rng, len(arm.vertices)) / arm.curve.bpb
    return estimate - above[0] + above[1], draws - drawn[0] + drawn[1]


class Pair(NamedTuple):
    """The baseline's optimum and the smallest model of the arm that reaches its loss, at size x; xs: draws."""

    arm: Optimum
    base: Optimum
    x: float
    xs: Float[np.ndarray, "R"]

    def ratio(self, value: Callable[[Record], float], noise: Any = 1.0) -> tuple[float, list[float] | None]:
        """(the arm's value over the baseline's, its interval); noise: draws of what else moves the ratio."""
        ratio = float(self.arm.curve.at(self.x, value) / self.base.curve.at(self.base.vertex, value))
        ratios = self.arm.curve.at(self.xs, value) / self.base.curve.at(self.base.vertices, value) * noise
        return ratio, interval_of(ratios[np.isfinite(ratios)], len(self.xs))


def equal_pair(arm: Optimum, base: Optimum, gap: tuple[float, Float[np.ndarray, "R"]]) -> Pair | None:
    """None if the arm's curve does not reach the baseline's optimal loss, or does with a model smaller than half of the
    smallest size that was run, where the curve is a guess."""
    smallest = size_of(arm.curve.points[0][0]) - np.log10(2)

    def size(vertex: Any, c: Any, nats: Any) -> Any:
        with np.errstate(invalid="ignore"):
            return vertex - np.sqrt(-nats / c)

    x = float(size(arm.vertex, arm.c, gap[0]))
    if not x >= smallest:
        return None
    return Pair(arm, base, x, size(arm.vertices, arm.curvatures, gap[1]))


def clock_noise(curves: Sequence[Curve], rng: np.random.Generator, resamples: int) -> Float[np.ndarray, "R"]:
    """Draws of what a ratio of two curves' times is multiplied with by chance: seconds of runs of one size differ as
    the machine is more or less busy, alike for all of them."""
    noise = np.zeros(resamples)
    for sd, df in (curve.clock for curve in curves):
        noise += sd * rng.standard_t(df, resamples) if df else 0
    return np.exp(noise)


@dataclass(frozen=True)
class Line:
    """How the baseline's optimal loss falls with its budget C, ln(L - floor) = p + slope ln C, and seconds grow,
    ln seconds = q + seconds ln C; low and high: the budgets that were run. floors, slopes: draws."""

    floor: float
    slope: float
    floors: Float[np.ndarray, "R"]
    slopes: Float[np.ndarray, "R"]
    seconds: float
    low: float
    high: float


def line_of(optima: Sequence[Optimum], rng: np.random.Generator) -> Line | None:
    """Least squares through the baseline's optima; None below two budgets or where the loss does not fall.

    Two budgets do not tell the loss that no budget removes: it is drawn uniformly from 0 to FLOOR of the least loss,
    and taken at the middle. Published laws put it near half of the loss."""
    if len(optima) < 2:
        return None
    budgets = np.log([o.curve.budget for o in optima])
    nats, levels = np.array([[o.nats] for o in optima]), np.stack([o.levels for o in optima])
    floor = FLOOR / 2 * float(nats.min())
    floors = rng.uniform(0, FLOOR, levels.shape[1]) * levels.min(axis=0)
    with np.errstate(invalid="ignore"):
        slope, slopes = float(_slope(budgets, np.log(nats - floor))[0]), _slope(budgets, np.log(levels - floors))
    wall = np.array([[float(np.log(o.curve.at(o.vertex, lambda r: r.wall_s)))] for o in optima])
    if slope >= 0:
        return None
    low, high = (float(f([o.curve.budget for o in optima])) for f in (np.min, np.max))
    slopes = np.where(slopes < 0, slopes, np.nan)
    return Line(floor, slope, floors, slopes, float(_slope(budgets, wall)[0]), low, high)


def multipliers(
    arm: Optimum,
    base: Optimum,
    gap: tuple[float, Float[np.ndarray, "R"]],
    line: Line,
    noise: Float[np.ndarray, "R"],
    by_law: Callable[[float, float], float] | None = None,
) -> dict[str, Any] | None:
    """flop_multiplier, wall_multiplier and their intervals; `budget`, which the baseline would need. None if the arm's
    loss lies below the floor. noise: draws of the clocks' (`clock_noise`).

    ln m = ln((L_arm - floor) / (L_base - floor)) / slope of the line; with a joint law of the baseline,
    `by_law(budget, nats)` is the budget at which its optimal loss has changed by so many nats, and the line gives only
    the spread."""
    with np.errstate(invalid="ignore"):
        log_m = np.log(1 + gap[0] / (base.nats - line.floor)) / line.slope
        draws = np.log(1 + gap[1] / (base.levels - line.floors)) / line.slopes
    if by_law is not None and np.isfinite(needed := by_law(arm.curve.budget, gap[0])):
        there = np.log(needed / arm.curve.budget)
        draws, log_m = draws + there - log_m, there
    if not np.isfinite(log_m):
        return None
    taken = float(arm.curve.at(arm.vertex, lambda r: r.wall_s))
    own = float(base.curve.at(base.vertex, lambda r: r.wall_s))
    known = np.isfinite(draws)
    told = draws[known]
    return {
        "flop_multiplier": float(np.exp(log_m)),
        "flop_multiplier_ci": interval_of(np.exp(told), len(draws)),
        "wall_multiplier": float(own * np.exp(line.seconds * log_m) / taken),
        "wall_multiplier_ci": interval_of(own * np.exp(line.seconds * told) / taken * noise[known], len(draws)),
        "budget": float(arm.curve.budget * np.exp(log_m)),
    }


def steps_per_s(record: Record) -> float:
    return record.tokens_per_s / record.settings["train"]["batch_tokens"]


def exponent(arm: str, optima: Sequence[Optimum]) -> dict[str, Any]:
    """The entry of `optimum_against_budget`: N* ~ C^a by least squares over the arm's optima; null below two."""
    points = []
    for optimum in optima:
        ends = optimum.curve.optimum.vertex_interval  # type: ignore[union-attr]
        sizes = (optimum.vertex, *ends)  # type: ignore[misc]
        points.append([optimum.curve.budget, *(float(optimum.curve.params_at(x)) for x in sizes)])
    entry: dict[str, Any] = {"arm": arm, "exponent": None, "exponent_ci": None, "points": points}
    if len(optima) < 2:
        return entry
    budgets = np.log10([o.curve.budget for o in optima])
    slopes = _slope(budgets, np.log10([o.curve.params_at(o.vertices) for o in optima]))
    found = float(_slope(budgets, np.log10([[o.curve.params_at(o.vertex)] for o in optima]))[0])
    return entry | {"exponent": found, "exponent_ci": interval_of(slopes[np.isfinite(slopes)], len(slopes))}


def interval_of(draws: Float[np.ndarray, "R"], of: int) -> list[float] | None:
    """The middle 95 % of the draws, None where too few of `of` have the quantity."""
    if len(draws) < REACHES * of:
        return None
    low, high = np.percentile(draws, [2.5, 97.5])
    return [float(low), float(high)]


def _drawn(interval: Interval, rng: np.random.Generator, resamples: int) -> Float[np.ndarray, "R"]:
    """Draws whose spread is that of the interval: each part by its own t."""
    seeds = interval.se_seeds * rng.standard_t(interval.df_seeds, resamples)
    return seeds + interval.se_docs * rng.standard_t(max(interval.df_docs, 1.0), resamples)


def _slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slopes of the columns of y over x."""
    away = x - x.mean()
    return away @ (y - y.mean(axis=0)) / (away @ away)
