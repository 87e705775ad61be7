"""One work in a process of its own: `python -m sparsemix.bench WORK FILE THREADS [quick]`. Writes FILE after every
case, so that an interrupted work keeps what it measured."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparsemix.bench.works import WORKS
from sparsemix.durable import write_atomic
from sparsemix.ops.impl import picked


def main(name: str, file: str, threads: str, mode: str = "") -> None:
    torch.set_num_threads(int(threads))
    work, began = WORKS[name], time.perf_counter()
    record: dict[str, Any] = {"about": work.about, "said": "interrupted", "cases": []}

    def write(at: str) -> None:
        seconds = round(time.perf_counter() - began, 1)
        write_atomic(Path(file), json.dumps(record | {"at": at, "seconds": seconds, "kernels": picked()}))

    write("")
    for case in work.cases(mode == "quick"):
        write(case.name)
        record["cases"].append(case.measure(mode == "quick"))
    record["said"] = "ok"
    write("")


if __name__ == "__main__":
    main(*sys.argv[1:])
