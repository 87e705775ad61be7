"""CPU seconds and memory of preparing text, for sizes that double: `python -m bench.preparation [MB ...]`.

Each size and kind of text is a process of its own. Linear means that the last column stays level."""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sparsemix.data import DataConfig, prepare

# Where a peak is counted in bytes, not in KiB.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def words(rng: random.Random, count: int) -> list[str]:
    """Words of a made-up language, some of which are frequent."""
    made = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 9))) for _ in range(count)]
    return rng.choices(made, weights=[1 / (i + 1) for i in range(count)], k=200_000)


def documents(kind: str, num_bytes: int) -> Iterator[str]:
    """Texts of about `num_bytes` in all: prose, many short ones, a single long one, Chinese, or without any space."""
    rng = random.Random(kind)
    common, signs = words(rng, 50_000), [chr(0x4E00 + i) for i in range(3000)]
    size = {"short": 300, "one": num_bytes, "prose": 20_000}.get(kind, 6_000)
    done = 0
    while done < num_bytes:
        if kind == "chinese":
            text = "".join(rng.choices(signs, k=size // 3))
        elif kind == "solid":
            text = "".join(rng.choices("abcdefghij(){};=.", k=size))
        else:
            text = " ".join(common[rng.randrange(len(common))] for _ in range(size // 6))
        done += len(text.encode())
        yield text


def measured(kind: str, num_bytes: int, folder: Path) -> dict[str, float]:
    """What preparing takes, without what writing the text and importing the package took."""
    path = folder / "text.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text in documents(kind, num_bytes):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    began = time.process_time()
    shards = prepare(DataConfig(text=(str(path),), vocab_size=1024), folder / "shards")
    spent = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return {"bytes": shards.manifest["bytes_total"], "cpu_s": spent, "peak_bytes": peak}


def main(sizes: list[int]) -> None:
    print("kind      MB   CPU s  peak MB  MB a CPU second")
    for kind in ("prose", "short", "one", "chinese", "solid"):
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "bench.preparation", "--one", kind, str(size * 10**6), folder]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            mb, cpu, peak = found["bytes"] / 1e6, found["cpu_s"], found["peak_bytes"] / 1e6
            print(f"{kind:8} {mb:4.0f} {cpu:7.1f} {peak:8.0f} {mb / cpu:8.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measured(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main([int(word) for word in sys.argv[1:]] or [8, 16, 32, 64])
