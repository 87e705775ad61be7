"""Calling C kernels, without torch's headers, and what they take.

A kernel is `void name(pointers and numbers..., int64_t threads)`: tensors arrive as pointers, int as int64_t, float as
double. Loaded after torch, it shares torch's OpenMP pool. `build.py` compiles them."""

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparsemix.ops import build
from sparsemix.ops.operands import check_call

TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14
# Below it the processor's own caches of addresses reach.
SMALLEST_HUGE = 2**24


def call(source: Path, name: str, *args: Tensor | int | float | None) -> None:
    """Run one kernel of `source`, in the library that `build.unusable` found last. None is NULL. A kernel's
    arguments are of the same types in every call, and what operands.py states of them is checked."""
    check_call(source.parent.name, name, args)
    kernel = getattr(build.library(source), name)
    if kernel.argtypes is None:
        kernel.argtypes = [*(_c_type(arg) for arg in args), ctypes.c_int64]
        kernel.restype = None
    values = []
    for arg in args:
        values.append(arg.data_ptr() if isinstance(arg, Tensor) else arg)
    kernel(*values, torch.get_num_threads())


def _c_type(arg: Tensor | int | float | None) -> type:
    if arg is None or isinstance(arg, Tensor):
        return ctypes.c_void_p
    return ctypes.c_double if isinstance(arg, float) else ctypes.c_int64


def typed(name: str, tensor: Tensor) -> str:
    """The kernel `name` for elements of this tensor's type."""
    return f"{name}_{'bf16' if tensor.dtype == torch.bfloat16 else 'f32'}"


def huge_pages(tensor: Tensor) -> str | None:
    """Let huge pages back a large tensor that nothing was written to yet; why not, None if it was done.

    Only pages touched afterwards are huge. Rows read at random from them miss fewer translations of addresses."""
    if isinstance(tensor, FakeTensor) or not tensor.is_cpu:
        return "only memory of the CPU has pages to choose"
    if tensor.nbytes < SMALLEST_HUGE:
        return f"a tensor under {SMALLEST_HUGE >> 20} MiB has no use for them"
    if not TRANSPARENT.is_file() or "[never]" in TRANSPARENT.read_text(encoding="ascii"):
        return f"the system does not allow them: {TRANSPARENT}"
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    whole = (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), ctypes.c_int(MADV_HUGEPAGE)):
        return os.strerror(ctypes.get_errno())
    return None
