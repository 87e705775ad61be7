"""Wall time, CPU seconds and page faults of works that are run in turn."""

import math
import resource
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

# A sample shorter than this repeats its work: clocks and CPU accounting are too coarse below.
SHORTEST_S = 0.01


class Sample(NamedTuple):
    """One call: seconds on the wall, CPU seconds of all threads (user and system), minor page faults."""

    wall_s: float
    cpu_s: float
    faults: float


class Timing(NamedTuple):
    """What is kept of all samples; per call."""

    min_s: float
    median_s: float
    cpu_s: float
    faults: float
    samples: int
    calls: int


def sample(run: Callable[[], object], calls: int = 1) -> Sample:
    """The mean over `calls` calls in a row."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(calls):
        run()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(wall / calls, cpu / calls, (after.ru_minflt - before.ru_minflt) / calls)


def interleave(runs: Mapping[str, Callable[[], object]], budget_s: float, most: int = 30) -> dict[str, Timing]:
    """Every run in turn, round after round, in an order that turns, until `budget_s` seconds are spent, but at least 3
    and at most `most` rounds. The first call of each warms up and counts for nothing: it compiles, allocates and loads.
    What takes longer than the budget after that is not called again."""
    calls: dict[str, int] = {}
    kept: dict[str, list[Sample]] = {name: [] for name in runs}
    for name, run in runs.items():
        run()
        first = sample(run)
        if first.wall_s > budget_s:
            kept[name].append(first)
        else:
            calls[name] = max(1, math.ceil(SHORTEST_S / max(first.wall_s, 1e-9)))
    began, names = time.perf_counter(), list(calls)
    for done in range(most if names else 0):
        if done >= 3 and time.perf_counter() - began > budget_s:
            break
        for i in range(len(names)):
            name = names[(i + done) % len(names)]
            kept[name].append(sample(runs[name], calls[name]))
    return {name: summary(samples, calls.get(name, 1)) for name, samples in kept.items()}


def summary(samples: list[Sample], calls: int) -> Timing:
    """Minimum and median of the wall time, medians of the rest."""
    wall, cpu, faults = zip(*samples, strict=True)
    return Timing(min(wall), median(wall), median(cpu), median(faults), len(samples), calls)
