"""C kernels as libraries: compiled by the system's compiler on first use, cached by content.

The environment may say SPARSEMIX_CC (a compiler, or `none`), SPARSEMIX_ISA (an instruction set below the machine's) and
SPARSEMIX_CACHE (the folder of compiled kernels)."""

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

from sparsemix.errors import ConfigError

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


def library(source: Path) -> ctypes.CDLL:
    """The library of `source` that `unusable` found last."""
    return _libraries[source]
