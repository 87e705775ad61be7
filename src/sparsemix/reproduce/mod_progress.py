"""How far the causal rule of Mixture-of-Depths agrees with the top-k, step by step, from what training logged."""

from collections.abc import Sequence
from statistics import fmean

from sparsemix.report.figures import Chart, Line, Point
from sparsemix.report.records import Record
from sparsemix.run import Run

RATES = ("accuracy", "precision", "recall")
BINS = 40


def over_steps(run: Record) -> dict[str, list[Point]]:
    """Of each rate: (steps, mean over layers and over the logged steps of a fortieth of the training), up to 40."""
    lines = [line for line in Run(run.folder).metrics() if any(name.endswith(".accuracy") for name in line)]
    if not lines:
        return {}
    last = lines[-1]["step"]
    found: dict[str, list[Point]] = {rate: [] for rate in RATES}
    for i in range(BINS):
        inside = [line for line in lines if last * i / BINS < line["step"] <= last * (i + 1) / BINS]
        for rate in RATES if inside else ():
            seen = [value for line in inside for name, value in line.items() if name.endswith(f".{rate}")]
            found[rate].append((fmean(line["step"] for line in inside), fmean(seen)))
    return found


def by_then(points: Sequence[Point], share: float) -> float:
    """A rate when this share of the steps was made."""
    steps = share * points[-1][0]
    return min(points, key=lambda point: abs(point[0] - steps))[1]


def mean_over_seeds(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Runs of equal length point by point."""
    return [(fmean(x for x, _ in at), fmean(y for _, y in at)) for at in zip(*curves, strict=False)]


def progress_chart(runs: Sequence[Record], always_skip: float, id: str = "predictor-over-steps") -> Chart | None:
    """Accuracy, precision and recall over the steps of training, mean over seeds (thin: single runs), and the accuracy
    of always answering `skip`. None without a log of them."""
    found = [curves for run in runs if (curves := over_steps(run))]
    if not found:
        return None
    lines = [
        Line(rate, i + 1, mean_over_seeds([c[rate] for c in found]), [c[rate] for c in found] if len(found) > 1 else ())
        for i, rate in enumerate(RATES)
    ]
    return Chart(
        id, "The predictor against the top-k", "training steps", "share, on training text", lines,
        [("always skip", always_skip)], y_span=(0.0, 1.0),
    )  # fmt: skip
