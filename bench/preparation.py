"""Is the time to prepare a text linear in its bytes, whatever the text? `python -m bench.preparation [MB]` makes texts
of mean kinds, of MB, 2 MB and 4 MB each, and gives CPU seconds a MB of each stage and the exponent of the whole (1 is
linear); exit code 1 where one is above 1.25. With `prepare` behind it, `prepare` itself in place of its stages."""

import itertools
import json
import math
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LINEAR, SIZES = 1.25, (1, 2, 4)
MB = 1_000_000


def prose(size: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 9))) for _ in range(20_000)]
    text = " ".join(words[int(20_000 * draw.random() ** 3)] for _ in range(size // 5))
    return (text * 2)[:size]


def _lines(documents: Iterator[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents)


def short_documents(at: Path, size: int) -> None:
    text = prose(size)
    (at / "a.jsonl").write_text(_lines(text[i : i + 1000] for i in range(0, size, 1000)))


def small_files(at: Path, size: int) -> None:
    text = prose(size)
    for i in range(0, size, 1000):
        place = at / str(i // 100_000)
        place.mkdir(exist_ok=True)
        (place / f"{i}.txt").write_text(text[i : i + 1000])


def one_json_line(at: Path, size: int) -> None:
    (at / "a.jsonl").write_text(_lines(iter([prose(size)])))


def one_text_line(at: Path, size: int) -> None:
    (at / "a.txt").write_text(prose(size))


def huge_documents(at: Path, size: int) -> None:
    text = prose(size // 4)
    for i in range(4):
        (at / f"{i}.txt").write_text("\n\n".join(text[j : j + 400] for j in range(0, len(text), 400)))


def runs_of_one_character(at: Path, size: int) -> None:
    each = size // 5
    (at / "a.jsonl").write_text(_lines(c * each for c in "a \n-é"[:5]))


def letters_without_space(at: Path, size: int) -> None:
    (at / "a.txt").write_text("".join(random.Random(0).choices(string.ascii_letters, k=size)))


KINDS: tuple[Callable[[Path, int], None], ...] = (
    short_documents,
    small_files,
    one_json_line,
    one_text_line,
    huge_documents,
    runs_of_one_character,
    letters_without_space,
)
STAGES = ("reading", "counting words", "tokenizing")


def measured(folder: str) -> list[float]:
    """CPU seconds of each stage."""
    from sparsemix.data import read_documents
    from sparsemix.data.tokenizer import encode_batch, train_tokenizer

    marks = [time.process_time()]
    texts = [document.text for document in read_documents([folder])]
    marks.append(time.process_time())
    tokenizer = train_tokenizer(texts, 1024)
    marks.append(time.process_time())
    for text in texts:
        encode_batch(tokenizer, [text])
    marks.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(marks)]


def prepared(folder: str) -> list[float]:
    """CPU seconds of `prepare`."""
    from sparsemix.data import DataConfig, prepare

    began = time.process_time()
    prepare(DataConfig(text=(folder,)), Path(folder).with_name("shards"))
    return [time.process_time() - began]


def child(what: str, folder: str) -> tuple[list[float], float]:
    """(seconds, most memory in MB) of a process of its own."""
    script = (
        f"import json, resource, sys; from bench.preparation import {what}; found = {what}(sys.argv[1]); "
        "print(json.dumps([found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], stdout=subprocess.PIPE, check=True, text=True)
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def main(words: list[str]) -> int:
    numbers = [float(word) for word in words if word != "prepare"]
    unit, what = numbers[0] if numbers else 1.0, "prepared" if "prepare" in words else "measured"
    worst = 0.0
    for kind in KINDS:
        took: list[tuple[list[float], float]] = []
        for times in SIZES:
            with tempfile.TemporaryDirectory() as place:
                texts = Path(place) / "texts"
                texts.mkdir()
                kind(texts, int(unit * times * MB))
                took.append(child(what, str(texts)))
                shutil.rmtree(texts)
        first, last = (sum(seconds) for seconds, _ in (took[0], took[-1]))
        exponent = math.log(last / first) / math.log(SIZES[-1])
        worst = max(worst, exponent)
        names = STAGES if what == "measured" else ("prepare",)
        stages = ", ".join(f"{n} {s / unit / SIZES[-1]:.3f}" for n, s in zip(names, took[-1][0], strict=True))
        memory = ", ".join(f"{peak:.0f}" for _, peak in took)
        print(f"{kind.__name__:>22}: exponent {exponent:.2f}; s/MB: {stages}; peak MB: {memory}", flush=True)
    return int(worst > LINEAR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
