"""What this machine does fast: device, number type, threads, compilation, and memory that is not faulted in anew."""

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from sparsemix.errors import ConfigError

DtypeSetting = Literal["auto", "float32", "bfloat16"]
ThreadsSetting = Literal["auto"] | Annotated[int, Field(ge=1)] | None
# `auto` takes the fewest threads whose rate is this share of the best: the last ones of a full machine add little.
ENOUGH = 0.95
# Processors that multiply bf16 do it at twice fp32's rate and more, emulation stays below it (docs/LOG.md). A processor
# says which it is; a measurement under load has said either of one and the same.
BF16_INSTRUCTIONS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
CPUINFO = Path("/proc/cpuinfo")
# FLOP/s below which no machine of today trains: by them a budget becomes seconds, the same ones every time.
CPU_THREAD_RATE, GPU_RATE = 5e10, 1e14
# torch.compile saved 14 % of a dense step (docs/LOG.md) and took 37 s for its one kind of block.
COMPILE_FROM_S = 900.0


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(setting: DtypeSetting, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU, and on a CPU that has instructions for its products, else fp32 (never fp16, which CPUs
    emulate). Losses depend on it, so it follows from the machine and not from its load."""
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if multiplies_bf16() else torch.float32


@lru_cache
def multiplies_bf16() -> bool:
    """Does the processor name instructions for bf16 products? Where it names none, as outside Linux, no."""
    if not CPUINFO.is_file():
        return False
    for line in CPUINFO.read_text(encoding="utf-8").splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not BF16_INSTRUCTIONS.isdisjoint(words.split())
    return False


@lru_cache
def product_rates(rounds: int = 3) -> dict[str, float]:
    """FLOP/s of one matrix product on the CPU by number type, to be shown: the best of a few interleaved rounds, some
    10 ms in all, measured once a process."""
    rows, d_in, d_out = 256, 512, 512
    seconds: dict[torch.dtype, float] = {}
    for _ in range(rounds + 1):  # the first finds its kernel and is never the best
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = torch.ones(rows, d_in, dtype=dtype), torch.ones(d_out, d_in, dtype=dtype)
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[dtype] = min(seconds.get(dtype, float("inf")), time.perf_counter() - began)
    return {str(d).removeprefix("torch."): 2.0 * rows * d_in * d_out / s for d, s in seconds.items()}


def thread_rates(counts: Iterable[int] | None = None, rounds: int = 4) -> dict[int, float]:
    """FLOP/s of an fp32 matrix product by number of threads: 1, 2, 4, ... up to the processors that this process may
    use. A machine whose quota is below its cores shows it here. The best of interleaved rounds; some 100 ms."""
    before, most = torch.get_num_threads(), usable_processors()
    counts = list(counts or doublings(most))
    rows, width = 2048, 512
    x, weight = torch.ones(rows, width), torch.ones(width, width)
    seconds: dict[int, float] = {}
    try:
        for _ in range(rounds + 1):  # the first starts the threads and is never the best
            for count in counts:
                torch.set_num_threads(count)
                began = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds[count] = min(seconds.get(count, float("inf")), time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return {count: 2.0 * rows * width**2 / s for count, s in seconds.items()}


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})


def use_threads(setting: ThreadsSetting, kept: int | None = None) -> int:
    """Set the threads of torch and of our kernels for a run, and say how many. Bits depend on them, so a run keeps
    those that it began with, unless this process may use fewer.

    None leaves what torch has: OMP_NUM_THREADS, or one a core; in a comparison a worker's share. `auto` measures up to
    that and takes the fewest that reach 95 % of the best rate. Raises ConfigError for more than processors."""
    most, share = usable_processors(), torch.get_num_threads()
    if isinstance(setting, int) and setting > most:
        raise ConfigError(f"train.threads={setting} exceeds the {most} processors that this process may use; lower it")
    if kept is not None:
        count = min(kept, max(most, share))
    elif setting == "auto":
        rates = thread_rates(doublings(min(most, share)))
        count = min(count for count, rate in rates.items() if rate >= ENOUGH * max(rates.values()))
    else:
        count = setting or share
    torch.set_num_threads(count)
    return count


@contextmanager
def own_threads() -> Iterator[None]:
    """What is called within may set its number of threads; afterwards it is as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_compile(setting: bool | Literal["auto"], budget_flops: float, device: torch.device) -> bool:
    """`auto` compiles where the budget is worth a quarter of an hour at 50 GFLOP/s a CPU thread or 100 TFLOP/s a GPU,
    and where there is a compiler; so it depends on settings and machine, not on the load. Raises ConfigError."""
    if device.type == "cuda":
        able, rate = True, GPU_RATE
    else:
        able = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
        rate = CPU_THREAD_RATE * torch.get_num_threads()
    if setting == "auto":
        return able and budget_flops >= COMPILE_FROM_S * rate
    if setting and not able:
        raise ConfigError("train.compile=True needs a C++ compiler (g++ or clang++); install one or leave compile out")
    return setting


def allocator_is_tunable() -> bool:
    """True where the C library is glibc."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def tune_cpu_allocator() -> None:
    """Keep freed memory instead of returning it to the system, for the rest of this process.

    glibc maps every large block anew and clears it page by page at first touch, in every step again. The price is
    memory: what was once needed stays. Raises ConfigError without glibc."""
    if not allocator_is_tunable():
        raise ConfigError("the allocator of this system has no such settings (glibc has); leave this out")
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    libc.mallopt(mmap_threshold, 2**30)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 2**26)
