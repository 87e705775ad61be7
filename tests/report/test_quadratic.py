"""The curve of a budget: its optimum and intervals on planted curves, and on those of the PEER paper's figure 1."""

import numpy as np
import pytest

from sparsemix.report.fits.quadratic import FAR, Sized, fit_quadratic

# C4 perplexity by layers L, read off figure 1 of arXiv:2407.04153: width 128 L, 12 L d^2 + 32000 d dense parameters.
PEER_FIGURE_1 = {
    6e18: (range(4, 14), {
        "dense": [32.13, 28.65, 26.35, 24.91, 24.17, 23.84, 23.70, 24.04, 24.48, 25.10],
        "moe": [26.05, 23.62, 22.17, 21.58, 21.52, 21.72, 22.18, 22.55, 23.20, 23.71],
        "pkm": [25.19, 23.47, 22.25, 21.92, 22.01, 22.23, 22.69, 23.27, 23.82, 24.52],
        "peer": [23.78, 21.80, 21.16, 20.62, 20.64, 20.83, 21.25, 21.73, 22.62, 23.36],
    }),
    2e19: ((7, 8, 9, 10, 11, 12, 13, 14, 16, 18), {
        "dense": [20.96, 19.88, 19.13, 18.67, 18.44, 18.32, 18.31, 18.45, 18.88, 19.67],
        "moe": [17.84, 17.41, 17.21, 17.11, 17.09, 17.24, 17.67, 17.89, 18.24, 18.82],
        "pkm": [17.96, 17.57, 17.34, 17.36, 17.54, 17.71, 17.82, 18.12, 18.62, 19.52],
        "peer": [17.13, 16.74, 16.55, 16.45, 16.55, 16.70, 16.96, 17.35, 18.09, 19.14],
    }),
}  # fmt: skip


def exact(xs, vertex=5.4, c=0.9, level=3.2):
    return [Sized(x, (0,), (level + c * (x - vertex) ** 2,)) for x in xs]


def law(u, alpha=0.38, beta=0.42, reducible=2.0):
    """Nats above 1 at u = ln(N / N*) on the line of equal FLOPs of a joint law."""
    shares = np.array([beta, alpha]) / (alpha + beta)
    return 1 + reducible * (shares[0] * np.exp(-alpha * u) + shares[1] * np.exp(beta * u) - 1)


def simulated(rng, sd, shared, num_sizes, step, shift, alpha=0.38, beta=0.42, num_seeds=5):
    """A ladder around the optimum at 0, each size with seed 0, the size nearest to it with all seeds."""
    u = (np.arange(num_sizes) - (num_sizes - 1) / 2 + shift) * np.log(step)
    best = int(np.abs(u).argmin())
    common = rng.normal(0, sd * shared**0.5, num_seeds)
    own = sd * (1 - shared) ** 0.5
    sizes = []
    for i, at in enumerate(u):
        seeds = tuple(range(num_seeds if i == best else 1))
        nats = tuple(float(law(at, alpha, beta) + common[s] + rng.normal(0, own)) for s in seeds)
        sizes.append(Sized(float(at / np.log(10)), seeds, nats))
    return sizes


@pytest.mark.parametrize(("budget", "arm"), [(b, arm) for b, (_, arms) in PEER_FIGURE_1.items() for arm in arms])
def test_the_papers_minima_are_found(budget, arm):
    layers, arms = PEER_FIGURE_1[budget]
    depth = np.array(layers, float)
    logs = np.log10(12 * depth * (128 * depth) ** 2 + 32000 * 128 * depth)
    nats = np.log(arms[arm])
    fit = fit_quadratic([Sized(float(x), (0,), (float(y),)) for x, y in zip(logs, nats, strict=True)])
    assert fit.bracketed
    assert abs(np.interp(fit.vertex, logs, depth) - depth[nats.argmin()]) < 1
    assert fit.minimum[0] == pytest.approx(nats.min(), abs=0.006)


def test_a_parabola_is_recovered_exactly():
    fit = fit_quadratic(exact([4.9, 5.1, 5.3, 5.5, 5.7]))
    assert fit.vertex == pytest.approx(5.4, abs=1e-9) and fit.minimum[0] == pytest.approx(3.2, abs=1e-9)
    assert fit.coef[2] == pytest.approx(0.9, abs=1e-9) and fit.bracketed and not fit.dropped


def test_the_size_that_has_the_seeds_sets_the_level_and_its_distance_is_taken_off():
    sizes = exact([4.9, 5.1, 5.3, 5.5, 5.7])
    sizes[1] = Sized(sizes[1].x, tuple(range(5)), tuple(sizes[1].mean + d for d in (-0.002, -0.001, 0, 0.001, 0.002)))
    fit = fit_quadratic(sizes)
    assert fit.at == sizes[1].x and fit.level[2] == 4
    assert fit.minimum[0] == pytest.approx(3.2, abs=1e-4)


def test_one_size_on_a_side_brackets_nothing():
    assert fit_quadratic(exact([5.1, 5.3, 5.5, 5.7])).bracketed
    assert not fit_quadratic(exact([5.3, 5.5, 5.7, 5.9, 6.1])).bracketed
    assert not fit_quadratic(exact([4.7, 4.9, 5.1, 5.3, 5.5])).bracketed


def test_a_curve_that_does_not_turn_has_no_interval():
    rising = [Sized(x, (0,), (3 + 0.1 * x - 0.01 * (x - 5) ** 2,)) for x in (4.8, 5.0, 5.2, 5.4, 5.6)]
    assert fit_quadratic(rising).vertex_interval is None
    rng = np.random.default_rng(0)
    flat = [Sized(x, (0,), (3 + rng.normal(0, 0.01),)) for x in (4.8, 5.0, 5.2, 5.4, 5.6)]
    assert fit_quadratic(flat).vertex_interval is None and not fit_quadratic(flat).bracketed


def test_three_sizes_say_why_there_is_no_curve():
    assert "3 sizes" in fit_quadratic(exact([5.2, 5.4, 5.6]))


def test_far_sizes_are_dropped_but_five_stay():
    near = exact([5.0, 5.2, 5.4, 5.6, 5.8])
    far = [Sized(x, (0,), (3.2 + 0.9 * (x - 5.4) ** 2 + 0.3,)) for x in (4.4, 6.4)]
    fit = fit_quadratic([*near, *far])
    assert fit.dropped == (4.4, 6.4) and fit.vertex == pytest.approx(5.4, abs=1e-9)
    wide = fit_quadratic(exact([4.4, 4.9, 5.4, 5.9, 6.4]))
    assert not wide.dropped and wide.sizes[-1] - 5.4 > (FAR / 0.9) ** 0.5


def test_scatter_beyond_the_seeds_is_the_error():
    sizes = exact(np.arange(5.1, 5.75, 0.1))
    moved = [Sized(s.x, s.seeds, (s.mean + 0.03 * (-1) ** i,)) for i, s in enumerate(sizes)]
    moved[3] = Sized(moved[3].x, (0, 1, 2, 3, 4), tuple(moved[3].mean + d for d in (-2e-3, -1e-3, 0, 1e-3, 2e-3)))
    fit = fit_quadratic(moved)
    assert fit.scatter and fit.df == len(sizes) - 3 and fit.sd > 0.02
    assert not fit_quadratic(simulated(np.random.default_rng(3), 0.01, 0.0, 7, 1.6, 0)).scatter


@pytest.mark.parametrize(
    ("sd", "num_sizes", "step", "shift"),
    [(0.005, 5, 1.6, 0), (0.02, 5, 1.8, 0.4), (0.01, 6, 1.8, 0), (0.02, 8, 1.5, 1)],
)
def test_intervals_cover_at_their_nominal_rate(sd, num_sizes, step, shift):
    rng = np.random.default_rng(round(1e4 * sd) + num_sizes)
    size, loss = [], []
    for _ in range(600):
        # Exponents of published joint laws differ by about this much.
        alpha = 0.4 + rng.normal(0, 0.03)
        fit = fit_quadratic(simulated(rng, sd, 0.2, num_sizes, step, shift, alpha, 0.8 - alpha))
        low, high = fit.vertex_interval
        nats, half = fit.minimum
        size.append(low <= 0 <= high)
        loss.append(abs(nats - 1) <= half)
    assert 0.92 < np.mean(size) < 0.985
    assert 0.92 < np.mean(loss) < 0.985


def test_single_runs_taken_for_exact_would_not_cover():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        sizes = simulated(rng, 0.02, 0.0, 5, 1.8, 0)
        x, y = np.array([[s.x, s.mean] for s in sizes]).T
        # What is left of the noise after three coefficients, with a normal's 1.96: the interval that is not used.
        design = np.stack([x**0, x, x**2], axis=1)
        coef, (rss,), _, _ = np.linalg.lstsq(design, y, rcond=None)
        slope = (np.linalg.inv(design.T @ design)[1, 1] * rss / len(x)) ** 0.5
        covered.append(abs(coef[1]) <= 1.96 * slope)
    assert np.mean(covered) < 0.85
