"""What this machine can run, and what would make it faster: `sparsemix doctor`."""

import importlib
import importlib.util
import os
import pkgutil
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from sparsemix import ops
from sparsemix.errors import ConfigError
from sparsemix.machine import pick_device, pick_dtype, product_rates, thread_rates
from sparsemix.ops import build
from sparsemix.ops.impl import Kernels
from sparsemix.provenance import hardware, versions

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Finding(NamedTuple):
    """One line of the examination; `advice` is empty where nothing is amiss."""

    what: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Machine, C compiler, GPU, and for every op the implementation that runs here. Builds the C kernels."""
    cuda = torch.cuda.is_available()
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [
        Finding("versions", said),
        Finding("processor", hardware()),
        _threads(),
        _dtype(),
        Finding("GPU", torch.cuda.get_device_name() if cuda else "none: everything runs on the processor"),
        _compiler(),
        _instruction_set(),
        _cache(),
        _huge_pages(),
        _triton(cuda),
        *(_op(kernels, "cuda" if cuda else "cpu") for kernels in all_kernels()),
    ]


def all_kernels() -> list[Kernels]:
    """What every op offers, by name."""
    names = [module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg]
    packages = [importlib.import_module(f"{ops.__name__}.{name}") for name in sorted(names)]
    return [kernels for package in packages for kernels in vars(package).values() if isinstance(kernels, Kernels)]


def _threads() -> Finding:
    threads, rates = torch.get_num_threads(), thread_rates()
    best = max(rates, key=lambda count: rates[count])
    said = ", ".join(f"{rate / 1e9:.0f} GFLOP/s with {count}" for count, rate in rates.items())
    # A run's bits depend on the number of threads, so training does not choose it unasked. A tenth is noise.
    slow = threads in rates and rates[best] > 1.1 * rates[threads]
    return Finding(
        "threads",
        f"{threads} ({said})",
        f"OMP_NUM_THREADS={best} or train.threads={best} was faster just now" if slow else "",
    )


def _dtype() -> Finding:
    device = pick_device()
    picked = str(pick_dtype("auto", device)).removeprefix("torch.")
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in product_rates().items())
    return Finding("train.dtype=auto", picked if device.type == "cuda" else f"{picked} ({rates})")


def _compiler() -> Finding:
    if path := build.compiler():
        return Finding("C compiler", path)
    return Finding("C compiler", "none", "install gcc or clang: without one the ops run on PyTorch's slower kernels")


def _instruction_set() -> Finding:
    try:
        return Finding("instruction set", f"{build.isa()} (the processor has {build.machine_isa()})")
    except ConfigError as error:
        return Finding("instruction set", build.machine_isa(), str(error))


def _cache() -> Finding:
    """The folder of compiled kernels, or why none is used."""
    try:
        folder = build.cache_folder()
        build.private_folder(folder)
    except OSError as error:
        return Finding("compiled kernels", "not run", str(error.strerror))
    kept = f"{folder} ({len(list(folder.glob('*.so')))} libraries)"
    if os.access(folder, os.W_OK):
        return Finding("compiled kernels", kept)
    return Finding("compiled kernels", f"{kept} cannot be written", "set SPARSEMIX_CACHE to a folder that can")


def _huge_pages() -> Finding:
    if not HUGE_PAGES.is_file():
        return Finding("huge pages", "not known here")
    chosen = HUGE_PAGES.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    advice = f"`madvise` in {HUGE_PAGES} makes look-ups in large tables faster" if chosen == "never" else ""
    return Finding("huge pages", chosen, advice)


def _triton(cuda: bool) -> Finding:
    there = importlib.util.find_spec("triton") is not None
    if cuda and not there:
        return Finding("Triton", "none", "pip install triton: the GPU kernels are written in it")
    return Finding("Triton", metadata.version("triton") if there else "none, and no GPU that would need it")


def _op(kernels: Kernels, device: str) -> Finding:
    fast = "triton" if device == "cuda" else "native"
    try:
        refusal = kernels.refuses(fast, device, torch.float32)
    except ConfigError as error:
        refusal = str(error)
    if refusal is None:
        return Finding(kernels.op, fast)
    # What the lines above have said, or what nobody can mend, needs no advice here.
    told = build.compiler() is None or refusal.startswith("the op has no such") or refusal == _cache().advice
    return Finding(kernels.op, "torch", "" if told else refusal)
