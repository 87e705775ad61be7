"""The runs of an arm at one budget, as points over sizes, with the curve through them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sparsemix.report.fits.quadratic import Quadratic, Sized, fit_quadratic
from sparsemix.report.optimum import Runs, by_size, size_of, standing
from sparsemix.report.records import Record


@dataclass(frozen=True)
class Curve:
    """Runs of one arm and budget by size, ascending in forward FLOPs per token, which are the size of a fit; `bpb` is
    bits per byte of one nat per token."""

    arm: str
    budget: float
    points: tuple[Runs, ...]
    bpb: float

    @cached_property
    def fit(self) -> Quadratic | str:
        """The quadratic, or why there is none."""
        return fit_quadratic([_sized(point) for point in self.points])

    @cached_property
    def optimum(self) -> Quadratic | None:
        """The quadratic if it says where the optimum is."""
        return None if self.said else self.fit  # type: ignore[return-value]

    @cached_property
    def said(self) -> str | None:
        """Why there is no optimum."""
        if isinstance(self.fit, str):
            return self.fit
        low, high = self.fit.sizes[0], self.fit.sizes[-1]
        turns = self.fit.coef[2] > 0
        if turns and self.fit.vertex_interval is None:
            return "the curve is flat within its noise: more sizes, further apart, or more seeds would tell"
        if turns and low <= self.fit.vertex <= high:
            return None
        means = [np.mean([r.nats for r in point]) for point in self.points]
        if (best := int(np.argmin(means))) in (0, len(means) - 1):
            end, others = ("smallest", "smaller") if best == 0 else ("largest", "larger")
            return f"the loss is least at the {end} size, {others} ones are needed"
        return "the losses do not turn upwards on both sides of a size"

    @property
    def bracketed(self) -> bool:
        return self.optimum is not None and self.optimum.bracketed

    @cached_property
    def seeded(self) -> Runs:
        """The runs that stand for the arm at this budget (`report/optimum.py`)."""
        return standing(self.points, self.optimum.vertex if self.optimum else None)

    @cached_property
    def clock(self) -> tuple[float, int]:
        """(standard deviation of ln seconds among runs of one size, its degrees of freedom)."""
        logs = [np.log([r.wall_s for r in point]) for point in self.points]
        df = sum(len(seconds) - 1 for seconds in logs)
        squares = sum(float(np.sum((seconds - seconds.mean()) ** 2)) for seconds in logs)
        return (float(np.sqrt(squares / df)) if df else 0.0), df

    def at(self, x: float | np.ndarray, value: Callable[[Record], float]) -> Any:
        """A positive quantity at size x: between sizes, and beyond them, as a power law of the FLOPs per token."""
        return 10 ** between(x, [(size_of(p[0]), np.log10(np.mean([value(r) for r in p]))) for p in self.points])

    def params_at(self, x: float | np.ndarray) -> Any:
        return self.at(x, lambda r: r.params)

    def as_data(self) -> dict[str, Any]:
        """The entry of `curves`."""
        fit = None if isinstance(self.fit, str) else self.fit
        return {
            "arm": self.arm,
            "budget": self.budget,
            "points": [_point(point) for point in self.points],
            "quadratic": None if fit is None else dict(zip("abc", map(float, fit.coef), strict=True)),
            "centre": None if fit is None else fit.centre,
            "optimum": self._optimum(),
            "standing": _point(self.seeded),
            "bracketed": self.bracketed,
            "said": self.said,
        }

    def _optimum(self) -> dict[str, Any] | None:
        fit = self.optimum
        if fit is None or fit.vertex_interval is None:
            return None
        nats, half = fit.minimum
        ends = fit.vertex_interval
        found = {"forward_flops": 10**fit.vertex, "forward_flops_ci": [10**x for x in ends], "nats": nats}
        found |= {"params": float(self.params_at(fit.vertex))}
        found |= {"params_ci": sorted(float(self.params_at(x)) for x in ends)}
        found |= {"nats_ci": [nats - half, nats + half], "bpb": nats * self.bpb}
        return found | {"bpb_ci": [(nats - half) * self.bpb, (nats + half) * self.bpb]}


def curves_of(records: Sequence[Record], arms: Sequence[str], bpb: float) -> list[Curve]:
    """Every arm's curves, budgets ascending; runs that tried a learning rate are in none."""
    cells: dict[tuple[int, float], list[Record]] = {}
    for record in records:
        cells.setdefault((arms.index(record.arm), record.budget), []).append(record)
    sized = {key: by_size(found) for key, found in sorted(cells.items())}
    return [Curve(arms[arm], budget, sizes, bpb) for (arm, budget), sizes in sized.items() if sizes]


def standing_runs(records: Sequence[Record]) -> dict[tuple[str, float], Runs]:
    """(arm, budget) -> the runs that stand for it, by the rule and the fit of the analysis. Arms as they come first,
    budgets ascending."""
    curves = curves_of(records, list(dict.fromkeys(r.arm for r in records)), 1.0)
    return {(curve.arm, curve.budget): curve.seeded for curve in curves}


def between(x: float | np.ndarray, points: Sequence[tuple[float, float]]) -> Any:
    """y at x on the line through the neighbours of x, or through the last two beyond them; points of one x are one."""
    same: dict[float, list[float]] = {}
    for at, y in points:
        same.setdefault(at, []).append(y)
    known, ys = np.array(sorted(same)), np.array([np.mean(same[at]) for at in sorted(same)])
    if len(known) == 1:
        return ys[0] + 0 * np.asarray(x)
    i = np.clip(np.searchsorted(known, x) - 1, 0, len(known) - 2)
    return ys[i] + (ys[i + 1] - ys[i]) / (known[i + 1] - known[i]) * (x - known[i])


def _sized(point: Runs) -> Sized:
    return Sized(size_of(point[0]), tuple(r.seed for r in point), tuple(r.nats for r in point))


def _point(point: Runs) -> dict[str, Any]:
    first = point[0]
    return {
        "params": first.params,
        "active_params": first.active_params,
        "forward_flops": first.forward_flops,
        "width": first.settings["model"]["d_model"],
        "nats": float(np.mean([r.nats for r in point])),
        "bpb": float(np.mean([r.bpb for r in point])),
        "seeds": [r.nats for r in point],
        "folders": [r.folder.name for r in point],
        "wall_s": float(np.mean([r.wall_s for r in point])),
    }
