"""The joint law L = E + A / N^alpha + B / D^beta (arXiv:2203.15556, approach 3), fitted in two ways."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq, minimize

from sparsemix.report.fits.bootstrap import percentiles, resampled, runs_of
from sparsemix.report.fits.curves import Curve, between
from sparsemix.report.fits.varpro import Projection

NAMES = ("E", "A", "B", "alpha", "beta")
# Exponents that are looked for; published ones lie between 0.1 and 0.6.
EXPONENTS = np.geomspace(0.03, 1.5, 40)
DELTA = 1e-3
FEWEST_BUDGETS = 3
MOST_RESAMPLES = {"varpro": 500, "huber": 100}


@dataclass(frozen=True)
class JointLaw:
    """L = E + A / N^alpha + B / D^beta in nats, N parameters, D training tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: Any, tokens: Any) -> Any:
        return self.E + self.A * params ** -float(self.alpha) + self.B * tokens ** -float(self.beta)

    @property
    def at_an_edge(self) -> bool:
        """Whether the runs do not tell the parameters: a term is gone, or an exponent lies where the search ends."""
        inside = all(EXPONENTS[1] < x < EXPONENTS[-2] for x in (self.alpha, self.beta))
        return not (inside and self.E > 1e-6 and self.A > 0 and self.B > 0)


def projection(params: Float[np.ndarray, "n"], tokens: Float[np.ndarray, "n"]) -> Projection:
    """Of the terms E, A / N^alpha and B / D^beta."""
    x, z = np.log(params), np.log(tokens)
    none = np.zeros_like(x)
    return Projection(np.array([[none, none], [x, none], [none, z]]), EXPONENTS)


def fit_varpro(params: np.ndarray, tokens: np.ndarray, nats: np.ndarray) -> JointLaw | None:
    """Least squares in nats by variable projection: a grid over the exponents, the rest linear. None if no law of
    positive terms fits."""
    law = np.hstack(projection(params, tokens).fits(nats[None], steps=100))[0]
    return None if np.isnan(law).any() else JointLaw(*map(float, law))


def fit_huber(
    params: np.ndarray, tokens: np.ndarray, nats: np.ndarray, starts: Sequence[JointLaw] | None = None
) -> JointLaw | None:
    """Huber of delta 1e-3 on the log loss, L-BFGS, the best of many starts (by default 25 pairs of exponents).

    The objective is the sum over delta^2, not a mean, and tolerances are at rounding: a mean of small numbers stops the
    search at its start (arXiv:2404.10102). Steps are taken in coordinates in which the start's Gauss-Newton matrix is
    the identity, as e, a and alpha nearly trade off."""
    centre = np.log(params).mean(), np.log(tokens).mean()
    x, z, y = np.log(params) - centre[0], np.log(tokens) - centre[1], np.log(nats)

    def slopes(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log of the law less log of the loss, its derivatives (n, 5)) for theta = ln E, ln A', ln B', alpha, beta."""
        parts = np.stack([np.full_like(x, theta[0]), theta[1] - theta[3] * x, theta[2] - theta[4] * z])
        top = parts.max(axis=0)
        shares = np.exp(parts - top)
        total = shares.sum(axis=0)
        shares /= total
        return top + np.log(total) - y, np.stack([*shares, -shares[1] * x, -shares[2] * z], axis=1)

    def search(law: JointLaw) -> tuple[float, np.ndarray]:
        terms = law.E, law.A * np.exp(-law.alpha * centre[0]), law.B * np.exp(-law.beta * centre[1])
        start = np.array([*np.log(np.maximum(terms, 1e-3)), law.alpha, law.beta])
        _, values, rows = np.linalg.svd(slopes(start)[1], full_matrices=False)
        scale = rows.T / np.maximum(values, 1e-6 * values[0])

        def objective(moved: np.ndarray) -> tuple[float, np.ndarray]:
            error, jacobian = slopes(start + scale @ moved)
            error = error / DELTA
            value = np.where(np.abs(error) <= 1, error**2 / 2, np.abs(error) - 0.5).sum()
            return float(value), scale.T @ (np.clip(error, -1, 1) @ jacobian) / DELTA

        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 30}
        found = minimize(objective, np.zeros(5), jac=True, method="L-BFGS-B", options=options)
        return found.fun, start + scale @ found.x

    with np.errstate(all="ignore"):
        searched = [search(law) for law in (_starts(params, tokens, nats) if starts is None else starts)]
    searched = [(value, theta) for value, theta in searched if np.isfinite(value) and (theta[3:] > 0).all()]
    if not searched:
        return None
    e, a, b, alpha, beta = min(searched, key=lambda found: found[0])[1]
    terms = np.exp([e, a + alpha * centre[0], b + beta * centre[1]])
    return JointLaw(*map(float, (*terms, alpha, beta)))


def budget_for(
    law: JointLaw, forward_at: Callable[[Any], Any], sizes: tuple[float, float], budget: float, change: float
) -> float:
    """The training FLOPs at which the optimal loss is that of `budget` plus `change` nats; nan if 1000 times more or
    less do not do it. forward_at: FLOPs of a token at log10 params; sizes: the least and most parameters that were run.
    The optimum of a budget C is the least law(N, C / (3 forward(N))) over N."""
    logs = np.linspace(np.log10(sizes[0]) - 2, np.log10(sizes[1]) + 2, 600)
    params, forward = 10**logs, 3 * forward_at(logs)

    def optimal(log_budget: float) -> float:
        return float(law.loss(params, np.exp(log_budget) / forward).min())

    start, reach = np.log(budget), np.log(1000.0)
    wanted = optimal(start) + change
    if not optimal(start + reach) < wanted < optimal(start - reach):
        return float("nan")
    return float(np.exp(brentq(lambda x: optimal(x) - wanted, start - reach, start + reach)))  # type: ignore[arg-type]


def laws_of(curves: Sequence[Curve], resamples: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(entries of `laws`, warnings): arms with three or more budgets; all their sizes count, as the law holds for those
    that a parabola does not."""
    entries, said = [], []
    for arm in dict.fromkeys(curve.arm for curve in curves):
        own = [curve for curve in curves if curve.arm == arm]
        if len(own) < FEWEST_BUDGETS:
            continue
        runs, clusters = runs_of(own)
        params, tokens, nats = (np.array([float(getattr(r, x)) for r in runs]) for x in ("params", "tokens", "nats"))
        if len({(r.params, r.tokens) for r in runs}) <= len(NAMES):
            continue
        found = joint_law(arm, params, tokens, nats, clusters, resamples)
        if not found or any(_law(entry).at_an_edge for entry in found):
            said.append(
                f"{arm}: these runs do not tell the joint law's parameters: a term or an exponent is at its limit"
            )
        entries += found
    return entries, said


def budget_by_law(entries: Sequence[dict[str, Any]], curves: Sequence[Curve]) -> Callable[[float, float], float] | None:
    """`budget_for` of the one arm whose entries and curves these are, by least squares; None without a law."""
    laws = [_law(entry) for entry in entries if entry["method"] == "varpro"]
    if not laws or laws[0].at_an_edge:
        return None
    sizes = {point[0].params: point[0].forward_flops for curve in curves for point in curve.points}
    points = [(float(np.log10(n)), float(np.log10(flops))) for n, flops in sizes.items()]

    def forward_at(logs: Any) -> Any:
        return 10 ** between(logs, points)

    return lambda budget, change: budget_for(laws[0], forward_at, (min(sizes), max(sizes)), budget, change)


def _law(entry: dict[str, Any]) -> JointLaw:
    return JointLaw(**{name: entry[name] for name in NAMES})


def joint_law(
    arm: str,
    params: np.ndarray,
    tokens: np.ndarray,
    nats: np.ndarray,
    clusters: Sequence[Hashable],
    resamples: int,
    methods: Sequence[str] = ("varpro", "huber"),
) -> list[dict[str, Any]]:
    """The entries of `laws` of one arm, intervals by the bootstrap."""
    entries = []
    least = fit_varpro(params, tokens, nats)
    if least is None:
        return entries
    # Huber's own residuals are 0 at the runs that it passes through, and would say that these have no noise.
    residuals = nats - least.loss(params, tokens)
    at = projection(params, tokens)
    leverage = at.leverage(nats, np.array([least.alpha, least.beta]))
    for method in methods:
        law = least if method == "varpro" else fit_huber(params, tokens, nats)
        if law is None:
            continue
        fitted = law.loss(params, tokens)
        again = resampled(fitted, residuals, leverage, clusters, min(resamples, MOST_RESAMPLES[method]))
        if method == "varpro":
            draws = np.hstack(at.fits(again))
        else:
            refits = [fit_huber(params, tokens, row, [law]) for row in again]
            draws = np.array([list(asdict(f).values()) for f in refits if f is not None])
        entry = {"arm": arm, "form": "joint", "method": method} | asdict(law)
        entry["ci"] = {name: percentiles(draws[:, i]) for i, name in enumerate(NAMES)}
        entry |= {"rmse": float(np.sqrt(np.mean((fitted - nats) ** 2))), "num_runs": len(nats)}
        entries.append(entry)
    return entries


def _starts(params: np.ndarray, tokens: np.ndarray, nats: np.ndarray) -> list[JointLaw]:
    """Laws over a grid of exponents, their terms by least squares."""
    grid = np.geomspace(0.12, 0.9, 5)
    pairs = [np.array([alpha, beta]) for alpha in grid for beta in grid]
    at = projection(params, tokens)
    return [JointLaw(*at.coefficients(nats, pair), *pair) for pair in pairs]
