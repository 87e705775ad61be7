"""Variable projection: least squares of sums of power laws, searched over exponents, linear algebra for the rest."""

from itertools import product

import numpy as np
from jaxtyping import Float


class Projection:
    """loss = sum_j coef_j exp(-sum_k p_k features[j, k]), coef >= 0: features are logs (of parameters, of tokens).

    One factorisation per point of the grid of exponents p serves all losses at the same runs (the bootstrap's).
    Golub and Pereyra (1973); for scaling laws arXiv:2603.22339."""

    def __init__(self, features: Float[np.ndarray, "J K n"], grid: Float[np.ndarray, "s"]) -> None:
        # Around the means, so that the columns are of one size whatever the exponents.
        self.centre = features.mean(axis=2)
        self.features = features - self.centre[..., None]
        self.grid = grid
        self.num_exponents = features.shape[1]
        points = np.array(list(product(grid, repeat=self.num_exponents)))
        q, r = np.linalg.qr(self.design(points))
        self.inverse = np.linalg.pinv(r)  # (g, J, J)
        self.across = np.ascontiguousarray(np.swapaxes(q, 1, 2))  # (g, J, n)

    def design(self, exponents: Float[np.ndarray, "g K"]) -> Float[np.ndarray, "g n J"]:
        return np.exp(-np.einsum("gk,jkn->gnj", exponents, self.features))

    def fits(
        self, nats: Float[np.ndarray, "R n"], steps: int = 3
    ) -> tuple[Float[np.ndarray, "R J"], Float[np.ndarray, "R K"]]:
        """(coefficients, exponents) for each row: the best of the grid, the bottom of the parabola through its
        neighbours, Gauss-Newton steps; nan where no positive coefficients fit."""
        coefs = np.full((len(nats), self.features.shape[0]), np.nan)
        exponents = np.full((len(nats), self.num_exponents), np.nan)
        shape = (len(self.grid),) * self.num_exponents
        for start in range(0, len(nats), 25):
            rows = nats[start : start + 25]
            parts = (self.across.reshape(-1, rows.shape[1]) @ rows.T).reshape(*self.across.shape[:2], len(rows))
            positive = (self.inverse @ parts >= 0).all(axis=1)
            rss = np.where(positive, (rows**2).sum(axis=1) - (parts**2).sum(axis=1), np.inf)  # (g, r)
            for r, best in enumerate(rss.argmin(axis=0)):
                if np.isfinite(rss[best, r]):
                    logs = _lowest(rss[:, r].reshape(shape), np.unravel_index(best, shape), np.log(self.grid))
                    exponents[start + r] = np.exp(self._refined(rows[r], logs, steps))
                    coefs[start + r] = self.coefficients(rows[r], exponents[start + r])
        return coefs, exponents

    def coefficients(self, nats: Float[np.ndarray, "n"], exponents: Float[np.ndarray, "K"]) -> Float[np.ndarray, "J"]:
        """Those of least squares, of either sign."""
        found = np.linalg.lstsq(self.design(exponents[None])[0], nats, rcond=None)[0]
        return found * np.exp(self.centre @ exponents)

    def leverage(self, nats: Float[np.ndarray, "n"], exponents: Float[np.ndarray, "K"]) -> Float[np.ndarray, "n"]:
        """How much of its own noise each run's fitted value takes up: the diagonal of J (J' J)^-1 J', J the derivatives
        by coefficients and exponents."""
        design = self.design(exponents[None])[0]
        coefs = np.linalg.lstsq(design, nats, rcond=None)[0]
        slopes = -np.einsum("nj,j,jkn,k->nk", design, coefs, self.features, exponents)
        return (np.linalg.qr(np.hstack([design, slopes]))[0] ** 2).sum(axis=1)

    def _refined(self, nats: np.ndarray, logs: np.ndarray, steps: int) -> np.ndarray:
        """Logs of the exponents after Gauss-Newton steps, exact to rounding where the losses follow a law; a step
        that raises the squares or makes a coefficient negative is halved."""
        rss, jacobian, residuals = self._squares(nats, logs)
        for _ in range(steps):
            step = np.linalg.lstsq(jacobian, residuals, rcond=None)[0]
            for _ in range(8):
                there = np.clip(logs + step, np.log(self.grid[0]), np.log(self.grid[-1]))
                lower, *rest = self._squares(nats, there)
                if lower < rss:
                    break
                step = step / 2
            else:
                break
            rss, logs, (jacobian, residuals) = lower, there, rest
        return logs

    def _squares(self, nats: np.ndarray, logs: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """(sum of squares, derivatives of the fit by the logs with the coefficients projected out, residuals)."""
        exponents = np.exp(logs)
        design = self.design(exponents[None])[0]
        q, r = np.linalg.qr(design)
        coefs = np.linalg.lstsq(r, q.T @ nats, rcond=None)[0]
        slopes = -np.einsum("nj,j,jkn,k->nk", design, coefs, self.features, exponents)
        residuals = nats - q @ (q.T @ nats)
        rss = float(residuals @ residuals) if (coefs >= 0).all() else np.inf
        return rss, slopes - q @ (q.T @ slopes), residuals


def _lowest(rss: np.ndarray, best: tuple, logs: Float[np.ndarray, "s"]) -> Float[np.ndarray, "K"]:
    """Logs of the exponents at the bottom of the parabola through a cell of the grid and its neighbours."""
    here = logs[list(best)]
    if any(i in (0, len(logs) - 1) for i in best):
        return here
    near = rss[tuple(slice(i - 1, i + 2) for i in best)]
    if not np.isfinite(near).all():
        return here
    size, middle = len(best), [1] * len(best)

    def at(*moves: tuple[int, int]) -> float:
        cell = list(middle)
        for axis, by in moves:
            cell[axis] += by
        return float(near[tuple(cell)])

    gradient = np.array([(at((k, 1)) - at((k, -1))) / 2 for k in range(size)])
    hessian = np.empty((size, size))
    for k in range(size):
        hessian[k, k] = at((k, 1)) - 2 * at() + at((k, -1))
        for m in range(k):
            crossed = at((k, 1), (m, 1)) - at((k, 1), (m, -1)) - at((k, -1), (m, 1)) + at((k, -1), (m, -1))
            hessian[k, m] = hessian[m, k] = crossed / 4
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return here
    return here + np.clip(-np.linalg.solve(hessian, gradient), -1, 1) * (logs[1] - logs[0])
