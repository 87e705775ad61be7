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

TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14
# Below it the processor's own caches of addresses reach.
SMALLEST_HUGE = 2**24


def call(source: Path, name: str, *args: Tensor | int | float | None) -> None:
    """Run one kernel of `source`, in the library that `build.unusable` found last. Tensors must be contiguous and on
    the CPU; None is NULL. A kernel's arguments are of the same types in every call."""
    kernel = getattr(build.library(source), name)
    if kernel.argtypes is None:
        kernel.argtypes = [*(_c_type(arg) for arg in args), ctypes.c_int64]
        kernel.restype = None
    values = []
    for arg in args:
        if isinstance(arg, Tensor):
            assert arg.is_cpu and arg.is_contiguous(), name
            arg = arg.data_ptr()
        values.append(arg)
    kernel(*values, torch.get_num_threads())


def _c_type(arg: Tensor | int | float | None) -> type:
    if arg is None or isinstance(arg, Tensor):
        return ctypes.c_void_p
    return ctypes.c_double if isinstance(arg, float) else ctypes.c_int64


def typed(name: str, tensor: Tensor) -> str:
    """The kernel `name` for elements of this tensor's type."""
    return f"{name}_{'bf16' if tensor.dtype == torch.bfloat16 else 'f32'}"


def row_ids(ids: Tensor, num_rows: int) -> Tensor:
    """Row numbers as a kernel takes them. Raises IndexError for one of no row: a kernel would read past the table."""
    ids = ids.long().contiguous()
    if ids.numel():
        low, high = ids.aminmax()
        if int(low) < 0 or int(high) >= num_rows:
            raise IndexError(f"row ids {int(low)} to {int(high)} reach out of a table of {num_rows} rows")
    return ids


def row_counts(counts: Tensor, num_rows: int, num_experts: int) -> Tensor:
    """Rows of each expert as a kernel takes them. Raises ValueError for negative counts and for more than `num_rows`
    in all: a kernel would read and write past them."""
    if len(counts) != num_experts:
        raise ValueError(f"counts of {len(counts)} experts do not fit weights of {num_experts}")
    counts = counts.long().contiguous()
    if num_experts:
        low, high = (int(end) for end in counts.aminmax())
        # Each of them first: the sum of larger ones may wrap.
        if low < 0 or high > num_rows or int(counts.sum()) > num_rows:
            raise ValueError(
                f"counts of {low} to {high} rows an expert must be at least 0 and add up to at most {num_rows} rows"
            )
    return counts


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
