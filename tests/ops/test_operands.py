"""No operand ends the process: ops in a child process, and their C kernels under sanitizers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsemix.ops import build

FUZZ = Path(__file__).with_name("fuzz.py")
# Not optimised for the time that takes; a memset of no bytes at NULL is allowed since C2y.
SANITIZING = """#!/bin/sh
exec {cc} "$@" -O0 -fsanitize=address,undefined -fno-sanitize=nonnull-attribute -fno-sanitize-recover=undefined
"""


def cases(tmp_path, mutations, **environment):
    """What the program printed. Its last case is the message where it fails."""
    case = tmp_path / "case"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSEMIX_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, str(FUZZ), "0", str(mutations)],
        env=plain | {"FUZZ_CASE": str(case)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    assert done.returncode == 0, f"{ended} at {case.read_text(encoding='utf-8')}\n{done.stderr[-3000:]}"
    return done.stdout


def test_operands_of_every_type_layout_and_size_are_answered_rightly_or_refused(tmp_path):
    said = cases(tmp_path, 200)
    ran, refused = (int(word) for word in said.split() if word.isdigit())
    assert ran == 20 * 4 * 7 + 200
    # Most mutations are no operands of the op.
    assert 50 < refused < 250


def sanitizer():
    """The libraries to load first, None where the compiler has no address sanitizer. It looks for C++'s exceptions,
    which PyTorch throws, when it starts."""
    cc = build.compiler()
    if cc is None or sys.platform != "linux":
        return None
    asked = [[cc, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() for ask in asked]
    return " ".join(found) if all(Path(library).is_absolute() for library in found) else None


@pytest.mark.skipif(sanitizer() is None, reason="the C compiler has no address sanitizer")
def test_c_kernels_stay_in_their_memory_whatever_the_operands(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(SANITIZING.format(cc=build.compiler()), encoding="ascii")
    compiler.chmod(0o755)
    cases(
        tmp_path,
        40,
        FUZZ_TYPES="2",
        SPARSEMIX_CC=str(compiler),
        SPARSEMIX_ISA="portable",
        SPARSEMIX_CACHE=str(tmp_path / "cache"),
        LD_PRELOAD=str(sanitizer()),
        ASAN_OPTIONS="detect_leaks=0",
    )
