"""How much memory the work of a launcher takes."""

from typing import Any

from sparsemix.memory import run_bytes
from sparsemix.settings import RunConfig
from sparsemix.sweep.jobs import Job


def needed_bytes(args: tuple[Any, ...]) -> float:
    """What the work on these arguments is estimated to take: that of the run among them, 0 if there is none."""
    configs = [arg.config if isinstance(arg, Job) else arg for arg in args if isinstance(arg, (Job, RunConfig))]
    return sum(map(run_bytes, configs))
