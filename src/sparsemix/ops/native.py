"""C kernels: compiled by the system's compiler on first use, cached by content, called without torch's headers.

A kernel is `void name(pointers and numbers..., int64_t threads)`: tensors arrive as pointers, int as int64_t, float as
double. Loaded after torch, it shares torch's OpenMP pool. The environment may say SPARSEMIX_CC (a compiler, or `none`),
SPARSEMIX_ISA (an instruction set below the machine's) and SPARSEMIX_CACHE (the folder of compiled kernels)."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparsemix.errors import ConfigError
from sparsemix.ops.operands import check_call

WISHES = ("SPARSEMIX_CC", "SPARSEMIX_ISA", "SPARSEMIX_CACHE")
# Where the headers of more than one kernel lie.
HEADERS = Path(__file__).parent
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
# Slowest first. Flags, not -march=native: a cache folder may be shared by different machines.
ISAS = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512vnni", "-mavx512bf16"),
}
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14
# Below it the processor's own caches of addresses reach.
SMALLEST_HUGE = 2**24
_libraries: dict[Path, ctypes.CDLL] = {}
COMMON = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")


def compiler() -> str | None:
    """The C compiler to use, None if there is none."""
    if wish := os.environ.get("SPARSEMIX_CC"):
        return None if wish == "none" else shutil.which(wish)
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def machine_isa() -> str:
    """The widest instruction set of this processor that kernels are built for."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        bf16 = torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()
        return "avx512_bf16" if bf16 else "avx512"
    return "avx2" if capability == "AVX2" else "portable"


def isa() -> str:
    """The instruction set that kernels are built for. Raises ConfigError for one that this machine has not."""
    most, wish = machine_isa(), os.environ.get("SPARSEMIX_ISA")
    usable = list(ISAS)[: list(ISAS).index(most) + 1]
    if wish and wish not in usable:
        raise ConfigError(f"SPARSEMIX_ISA={wish} is none of {', '.join(usable)}, which this machine can run")
    return wish or most


def cache_folder() -> Path:
    """Where compiled kernels lie; a folder of this user that need not survive."""
    if wish := os.environ.get("SPARSEMIX_CACHE"):
        return Path(wish)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsemix" / "kernels"


@lru_cache
def _built(source: Path, cc: str, isa: str, folder: Path) -> ctypes.CDLL:
    flags = (*COMMON, *ISAS[isa], *(("-fopenmp",) if sys.platform == "linux" else ()))
    stamp = f"{cc} {Path(cc).stat().st_mtime_ns} {' '.join(flags)}".encode()
    headers = b"".join(header.read_bytes() for at in (HEADERS, source.parent) for header in sorted(at.glob("*.h")))
    content = hashlib.sha256(source.read_bytes() + headers + stamp).hexdigest()[:16]
    library = folder / f"{source.parent.name}-{isa}-{content}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Built aside and renamed: processes that start together do not read half a library.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            built = Path(aside) / library.name
            command = [cc, *flags, f"-I{HEADERS}", str(source), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise OSError(0, f"{cc} cannot build {source.parent.name}: {(lines or ['no message'])[0]}")
            built.replace(library)
    return ctypes.CDLL(str(library))


def unusable(source: Path) -> str | None:
    """Why the kernels of `source` cannot run here, None if they can. Builds them on the first call."""
    found = _loaded(source, *(os.environ.get(wish) for wish in WISHES))
    if isinstance(found, str):
        return found
    _libraries[source] = found
    return None


@lru_cache
def _loaded(source: Path, *wishes: str | None) -> ctypes.CDLL | str:
    """The library, or why there is none. What the environment wishes is part of the key: a change of it is seen."""
    cc = compiler()
    if cc is None:
        return "no C compiler was found (cc, gcc or clang; SPARSEMIX_CC names another)"
    try:
        return _built(source, cc, isa(), cache_folder())
    except OSError as error:
        reason = error.strerror or str(error)
        # Without a compiler PyTorch's kernels are what one expects; with one that fails they are not.
        warnings.warn(
            f"{reason}; PyTorch's slower kernels run instead (sparsemix doctor)", RuntimeWarning, stacklevel=3
        )
        return reason


def call(source: Path, name: str, *args: Tensor | int | float | None) -> None:
    """Run one kernel of `source`, in the library that `unusable` found last. None is NULL. A kernel's
    arguments are of the same types in every call, and what operands.py states of them is checked."""
    check_call(source.parent.name, name, args)
    kernel = getattr(_libraries[source], name)
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
