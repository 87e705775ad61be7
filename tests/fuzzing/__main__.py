"""Fuzz the command line in this process: `python tests/fuzzing --seconds 60 --seed 0`, or one `--case N` of a seed.

Prints each kind of fault once, as a line of JSON with its case, and ends with 1 if there was one."""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fuzz_cases as cases
import torch

from sparsemix.cli import app, ending
from sparsemix.report import pictures

# The pictures are drawn already, as SVG.
pictures.png = lambda shape: b""
HANG_S = 15
MEMORY = 12 * 2**30


class HangError(BaseException):
    """A command did not end in time."""


def _hang(*_: object) -> None:
    raise HangError


def ask(words: list[str]) -> tuple[int, str, str]:
    """(exit code, what stood on standard error, where our code failed if it did) of one command."""
    faults = []

    def kept(error: BaseException) -> str:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "sparsemix" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        faults.append(f"{type(error).__name__} at {where}: {str(error)[:200]}")
        return "a file"

    ending._traceback = kept
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    before = sys.argv, sys.stdout, sys.stderr
    sys.argv, sys.stdout, sys.stderr = ["sparsemix", *words], *streams
    signal.alarm(HANG_S)
    try:
        app.run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except HangError as error:
        kept(error)
        code = -1
    finally:
        signal.alarm(0)
        sys.argv, sys.stdout, sys.stderr = before
    streams[1].flush()
    return code, streams[1].buffer.getvalue().decode("utf-8", "replace"), "; ".join(faults)


def fault(code: int, said: str, failed: str) -> str | None:
    """What is wrong with how a command ended, or None."""
    if failed:
        return failed
    lines = [line for line in said.splitlines() if line.startswith("sparsemix: ")]
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in said:
        return f"traceback: {said[-300:]}"
    if code and (len(lines) != 1 or said.splitlines()[-1:] != lines):
        return f"not one line: {said[-300:]!r}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    parser.add_argument("--slow", action="store_true", help="also print cases of more than a second")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _hang)
    began, seen, done = time.monotonic(), set(), 0
    with tempfile.TemporaryDirectory() as folder:
        cases.build(place := Path(folder) / "whole")
        while (asked.case is None and time.monotonic() - began < asked.seconds) or done == 0:
            number = done if asked.case is None else asked.case
            # Names without a folder lead here.
            for name in ("copy", "here"):
                (Path(folder) / name).mkdir()
            copy, here = Path(folder) / "copy", Path(folder) / "here"
            os.chdir(here)
            words, what = cases.call(place, copy, random.Random(f"{asked.seed}/{number}"))
            asked_at = time.monotonic()
            ended = ask(words)
            slow = time.monotonic() - asked_at
            done += 1
            wrong = fault(*ended)
            if asked.slow and slow > 1:
                print(json.dumps({"case": number, "what": what, "s": round(slow, 1), "words": words[:4]}), flush=True)
            if asked.case is not None:
                print(ended)
            if wrong is not None and wrong.partition(":")[0:1] + tuple(wrong.split()[2:3]) not in seen:
                seen.add(wrong.partition(":")[0:1] + tuple(wrong.split()[2:3]))
                short = [word[:80] for word in words]
                print(json.dumps({"case": number, "what": what, "wrong": wrong, "words": short}), flush=True)
            os.chdir(folder)
            for path in (copy, here, copy.with_name("copy-out")):
                shutil.rmtree(path, ignore_errors=True)
    print(f"{done} cases, {len(seen)} kinds of fault, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if seen else 0


sys.exit(main())
