"""What a piece of work allocates on the CPU, inside ops as well, in bytes."""

from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocated(NamedTuple):
    peak: int  # the most held at a time, beyond what was held before
    largest: int  # the largest single tensor
    held: int  # what is still held in the end, beyond what was held before


def allocated(work) -> Allocated:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    sizes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes, "the profiler saw no allocation"
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return Allocated(peak, max(sizes), held)
