"""How much memory a run takes, estimated from its settings, how much there is, and one line where it was not enough."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparsemix.errors import OutOfMemoryError
from sparsemix.machine import pick_device, pick_dtype
from sparsemix.settings import RunConfig

# What a worker takes beside its model: what torch imports late, its allocator's reserve, text.
PROCESS_BYTES = 130e6
# Weight, gradient and two moments, each fp32.
BYTES_PER_PARAM = 16
# Every matrix product has the model's width on one side, so its FLOPs say how wide the other is: a number for each is
# kept until the backward pass, or made there, this many times in all (products, what feeds them, norms, residuals,
# gradients). Measured at 512 to 8192 tokens, widths 64 to 256: 2.5 to 2.9 for every kind, and 5.9 where ternary layers
# also keep what was quantised; all in all the estimate was 1.0 to 1.5 times the peak.
COPIES, TERNARY_COPIES = 3, 6
# Evaluation has the logits of a whole batch at a time, and their exponentials, where training has a part of them.
LOGIT_COPIES = 2
# In bf16 on a CPU oneDNN keeps a kernel for every number of tokens that an expert has taken; measured after 120 steps.
EXPERT_KERNELS_BYTES = 5e8


def run_bytes(config: RunConfig) -> float:
    """Estimated peak of a run's process beyond what processes share, in bytes; recomputed blocks count as kept."""
    model, cost = config.model, config.model.cost()
    inside = sum(flops for item, flops in cost.items.items() if item not in ("attention", "logits"))
    widths = inside / model.seq_len / (2 * model.d_model)
    copies = TERNARY_COPIES if "ternary" in str(model.blocks) else COPIES
    tokens = config.batch_size * model.seq_len
    kept = copies * widths * tokens / config.train.accumulation + LOGIT_COPIES * model.vocab_size * tokens
    ragged = any(f"kind='{kind}'" in str(model.blocks) for kind in ("moe", "mode"))
    device = pick_device()
    if ragged and device.type == "cpu" and pick_dtype(config.train.dtype, device) == torch.bfloat16:
        kept += EXPERT_KERNELS_BYTES / 4
    return PROCESS_BYTES + BYTES_PER_PARAM * cost.params + 4 * kept


def available_bytes() -> float:
    """Free memory of what trains here: of the GPU if there is one, else of this machine or of this process's share."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    free = float("inf")
    if (meminfo := Path("/proc/meminfo")).is_file():
        free = next(
            1024.0 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line
        )
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, taken = Path("/sys/fs/cgroup") / most, Path("/sys/fs/cgroup") / used
        if limit.is_file() and taken.is_file() and (text := limit.read_text().strip()) != "max":
            free = min(free, float(text) - float(taken.read_text()))
    return free


def allowed_bytes() -> float:
    """Free memory as `available_bytes`, or what the limits of this process (`ulimit -v`) leave it, if that is less."""
    free = available_bytes()
    if sys.platform != "linux" or torch.cuda.is_available():
        return free
    import resource

    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], int(Path("/proc/self/statm").read_text().split()[0])
    return free if limit == resource.RLIM_INFINITY else min(free, limit - pages * float(resource.getpagesize()))


# How allocators say it: PyTorch's on CPUs and GPUs, C++, the system, numpy.
_SHORTAGE = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc|cannot allocate memory", re.I)


def is_shortage(error: BaseException) -> bool:
    """Does an exception say that there is not enough memory?"""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(_SHORTAGE.search(str(error)))


@contextmanager
def shortage(needs: Callable[[], tuple[str, float, str]]) -> Iterator[None]:
    """Where the memory inside does not suffice, one line of `needs`: (what is asked for, its estimated bytes, the way
    out), and of what was free at the beginning. Raises OutOfMemoryError."""
    free = allowed_bytes()
    try:
        yield
    # Libraries below have an error of their own each.
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_shortage(error):
            raise
        what, size, way_out = needs()
        raise OutOfMemoryError(
            f"{what}: out of memory; it takes about {size / 2**30:.1f} GiB, and {free / 2**30:.1f} were free; {way_out}"
        ) from None


@contextmanager
def of_run(config: RunConfig) -> Iterator[None]:
    """A run's `shortage`. Raises OutOfMemoryError."""

    def needs() -> tuple[str, float, str]:
        model, train = config.model, config.train
        what = f"model.d_model={model.d_model}, train.batch_tokens={train.batch_tokens}"
        way_out = "lower them, raise train.accumulation, set train.recompute_blocks=true, or run fewer at a time"
        return what, run_bytes(config), way_out

    with shortage(needs):
        yield
