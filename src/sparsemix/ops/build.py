"""C kernels as libraries: compiled by the system's compiler on first use, cached by content.

The environment may say SPARSEMIX_CC (a compiler, or `none`), SPARSEMIX_ISA (an instruction set below the machine's) and
SPARSEMIX_CACHE (the folder of compiled kernels)."""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from sparsemix.durable import scratch, sync
from sparsemix.errors import ConfigError
from sparsemix.ops import trust

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
OTHER_FOLDER = "SPARSEMIX_CACHE names another folder"
# A kernel's definition in preprocessed C: what is not static and takes the number of threads last.
KERNEL = re.compile(r"(?:^|[;}])\s*void\s+(\w+)\s*\([^()]*\bint64_t\s+threads\s*\)\s*\{", re.MULTILINE)
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
    """Where compiled kernels lie; a folder of this user that need not survive. Raises OSError if none is known."""
    wish = os.environ.get("SPARSEMIX_CACHE")
    try:
        if wish:
            return Path(wish).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "sparsemix" / "kernels"
    except RuntimeError:
        raise OSError(0, f"this user has no home folder to keep compiled kernels in; {OTHER_FOLDER}") from None


def private_folder(folder: Path) -> None:
    """Make the folder, for this user alone. Raises OSError if it cannot be made or others may write there."""
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OSError(0, f"{folder} cannot be made ({error.strerror}); {OTHER_FOLDER}") from None
    if not folder.is_dir():
        raise OSError(0, f"{folder} is no folder to keep compiled kernels in; {OTHER_FOLDER}")
    if why := trust.distrust(folder):
        raise OSError(0, f"kernels in {folder} are not run: {why}; {OTHER_FOLDER}")


def stored(folder: Path, name: str) -> bytes | None:
    """The library `name` that was built earlier and is as it was written, None if there is none. Its file's name ends
    with the hash of its content. Raises OSError for one of another user or that others may write."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        with suppress(FileNotFoundError):
            content = _content(path)
            # A name can be right of a part alone: of what was cut before it was named.
            if content is not None and path.name == file_name(name, content) and fragment(content) is None:
                return content
            # Damaged, or no file at all: what is built now takes its place.
            path.unlink()
    return None


def _content(path: Path) -> bytes | None:
    """Bytes of a file, None if it is none. It is opened once: what was examined is what is read."""
    try:
        # A pipe in its place must not be waited for.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            return None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        if not trust.owned(status) or trust.others_write(status):
            whose = "can be written by others" if trust.owned(status) else "is another user's"
            raise OSError(0, f"{path} is not run: it {whose}; delete it, or {OTHER_FOLDER}")
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def file_name(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.so"


@lru_cache
def _built(source: Path, cc: str, isa: str, folder: Path) -> ctypes.CDLL:
    flags = (*COMMON, *ISAS[isa], *(("-fopenmp",) if sys.platform == "linux" else ()))
    stamp = f"{cc} {Path(cc).stat().st_mtime_ns} {' '.join(flags)}".encode()
    headers = b"".join(header.read_bytes() for at in (HEADERS, source.parent) for header in sorted(at.glob("*.h")))
    key = hashlib.sha256(source.read_bytes() + headers + stamp).hexdigest()[:16]
    name = f"{source.parent.name}-{isa}-{key}"
    private_folder(folder)
    if content := stored(folder, name):
        return _opened(content, name)
    if not os.access(folder, os.W_OK):
        raise OSError(0, f"{folder} cannot be written; {OTHER_FOLDER}")
    content, kernels = compile_source(source, cc, flags)
    library = _opened(content, name)
    if missing := [kernel for kernel in kernels if not hasattr(library, kernel)]:
        raise OSError(0, f"{cc} built {source.parent.name} without {missing[0]}")
    # Only what holds every kernel is kept.
    try:
        # Not `aside`, which gives files the umask's mode: what others may write is not run.
        with scratch(final := folder / file_name(name, content)) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(content)
            sync(temporary)
            temporary.replace(final)
    except OSError as error:
        raise OSError(0, f"{folder} cannot be written ({error.strerror}); {OTHER_FOLDER}") from None
    return library


def compile_source(source: Path, cc: str, flags: tuple[str, ...]) -> tuple[bytes, list[str]]:
    """A shared library's bytes, and the names of the kernels that its source defines. Raises OSError with the
    compiler's first complaint, or if what it wrote is no whole library."""
    name = source.parent.name
    with tempfile.TemporaryDirectory() as aside:
        built = Path(aside) / "built.so"
        command = [cc, *flags, f"-I{HEADERS}", str(source)]
        _run([*command, "-o", str(built), "-lm"], name)
        if not built.is_file():
            raise OSError(0, f"{cc} wrote no library for {name}")
        content = built.read_bytes()
    if why := fragment(content):
        raise OSError(0, f"{cc} wrote no library for {name}, but {why}")
    kernels = KERNEL.findall(_run([*command, "-E", "-P"], name))
    if not kernels:
        raise OSError(0, f"{cc} shows no kernel in the source of {name} (-E -P)")
    return content, kernels


def _run(command: list[str], name: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        said = (lines or [f"exit code {done.returncode}"])[0]
        raise OSError(0, f"{command[0]} cannot build {name}: {said}")
    return done.stdout


def fragment(content: bytes) -> str | None:
    """What these bytes are in place of a whole library, None if they are one as far as its tables tell. The system
    would map a shorter one and die at the first page that is not there."""
    if not content:
        return "an empty file"
    if sys.platform != "linux":
        return None
    if content[:4] != b"\x7fELF":
        return "a file of another kind"
    try:
        wide, order = content[4] == 2, "<" if content[5] == 1 else ">"
        program, sections = struct.unpack_from(order + ("QQ" if wide else "II"), content, 32 if wide else 28)
        size, count, each, rows = struct.unpack_from(order + "HHHH", content, 54 if wide else 42)
        at = (8, 32) if wide else (4, 16)
        reach = [sections + each * rows]
        for header in range(program, program + size * count, size or 1):
            start, length = (struct.unpack_from(order + ("Q" if wide else "I"), content, header + i)[0] for i in at)
            reach.append(start + length)
    except (struct.error, IndexError):
        return f"the first {len(content)} bytes of one"
    return f"the first {len(content)} of {max(reach)} bytes" if max(reach) > len(content) else None


def _opened(content: bytes, name: str) -> ctypes.CDLL:
    """The library of these very bytes: a copy that no other process can change or cut off while it runs."""
    try:
        if sys.platform == "linux":
            fd = os.memfd_create(name)
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            # Never closed: the loader knows a library by its path, and would take the next of this number for it.
            return ctypes.CDLL(f"/proc/self/fd/{fd}")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as alone:
            path = Path(alone) / f"{name}.so"
            path.write_bytes(content)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise OSError(0, f"the kernels of {name} cannot be loaded: {error}") from None


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
    if cc is None and os.environ.get("SPARSEMIX_CC", "none") == "none":
        return "no C compiler was found (cc, gcc or clang; SPARSEMIX_CC names another)"
    try:
        if cc is None:
            raise OSError(0, f"SPARSEMIX_CC={os.environ['SPARSEMIX_CC']} is no program that can be run")
        return _built(source, cc, isa(), cache_folder())
    except OSError as error:
        # Those of number 0 are worded here; the system's name the file only as a whole.
        reason = str(error.strerror if error.errno == 0 else error)
        # Without a compiler PyTorch's kernels are what one expects; with one that fails they are not.
        warnings.warn(
            f"{reason}; PyTorch's slower kernels run instead (sparsemix doctor)", RuntimeWarning, stacklevel=3
        )
        return reason


def library(source: Path) -> ctypes.CDLL:
    """The library of `source` that `unusable` found last."""
    return _libraries[source]
