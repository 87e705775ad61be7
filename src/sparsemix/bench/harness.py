"""Runs works one after the other, each in a process of its own, and keeps what they measured."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sparsemix.bench.floors import FLOORS
from sparsemix.commit import commit
from sparsemix.config import ConfigError, nearest
from sparsemix.durable import write_atomic
from sparsemix.inputs import load_json
from sparsemix.provenance import hardware, versions

SCHEMA = 1
PEERS = ("PEER-pytorch", "product-key-memory", "st-moe-pytorch", "mixture-of-experts", "transformers")
# Says which work runs, and which of its cases.
Say = Callable[[str], None]


def chosen(only: Sequence[str], known: Sequence[str]) -> list[str]:
    """The works to run: all, or those named, after the ceilings that their shares need. Raises ConfigError."""
    for name in only:
        if name not in known:
            raise ConfigError(f"--only {name} is none of {', '.join(known)}{nearest(name, known)}")
    return [name for name in known if not only or name in only or name == "ceilings"]


def default_path(now: datetime) -> Path:
    """bench/results/DATE.json in a checkout, else bench-DATE.json here."""
    folder = Path("bench") / "results"
    return folder / f"{now:%Y-%m-%d-%H%M}.json" if folder.is_dir() else Path(f"bench-{now:%Y-%m-%d-%H%M}.json")


def about(command: str, threads: int, quick: bool, now: datetime) -> dict[str, Any]:
    """What the numbers depend on besides the code of the works."""
    created = now.isoformat(timespec="minutes")
    return {
        "schema": SCHEMA,
        "created": created,
        "command": command,
        "commit": commit(),
        "hardware": hardware(),
        "threads": threads,
        "quick": quick,
        "versions": versions() | {name: version_of(name) for name in PEERS},
        "works": {},
    }


def continued(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the works that `file` holds already, so that one work can be measured again. Raises ConfigError if
    it holds something else, or what was measured elsewhere."""
    if not file.is_file():
        return result
    before = load_json(file)
    for name in ("schema", "hardware", "threads", "quick"):
        if before.get(name) != result[name]:
            raise ConfigError(
                f"--out {file} holds results with {name}={before.get(name)}, not {result[name]}; choose another file"
            )
    return result | {"works": before["works"]}


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def run(names: Sequence[str], result: dict[str, Any], threads: int, say: Say, file: Path) -> None:
    """Measures every work into `result` and `file`, which is written after each; KeyboardInterrupt passes through when
    what was measured is kept."""
    for i, name in enumerate(names, start=1):
        try:
            record = one(name, threads, result["quick"], lambda at, i=i: say(f"{i}/{len(names)} {at}"))
            result["works"][name] = record | {"commit": result["commit"], "created": result["created"]}
        except Interrupted as stop:
            result["works"][name] = stop.record
            raise KeyboardInterrupt from None
        finally:
            with_shares(result["works"])
            write_atomic(file, json.dumps(result, indent=1) + "\n")


class Interrupted(Exception):
    """Ctrl-C inside a work; `record` holds its finished cases."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.record = record


def one(name: str, threads: int, quick: bool, say: Say) -> dict[str, Any]:
    """The record of one work; one that fails says so in a line."""
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder) / "record.json", Path(folder) / "errors"
        command = [sys.executable, "-m", "sparsemix.bench", name, str(file), str(threads)]
        # transformers and torch must not draw bars over ours.
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
        with errors.open("wb") as stream:
            worker = subprocess.Popen(
                [*command, *(["quick"] if quick else [])], stdout=stream, stderr=stream, env=os.environ | quiet
            )
            try:
                while worker.poll() is None:
                    say(": ".join(filter(None, (name, read(file).get("at")))))
                    try:
                        worker.wait(timeout=0.5)
                    except subprocess.TimeoutExpired:
                        continue
            except KeyboardInterrupt:
                stop(worker)
                raise Interrupted(read(file)) from None
        record = read(file)
        if worker.returncode:
            lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            record["said"] = f"failed: {lines[-1] if lines else f'exit status {worker.returncode}'}"
        return {key: value for key, value in record.items() if key != "at"}


def stop(worker: subprocess.Popen[bytes]) -> None:
    """Ends a work; a terminal's Ctrl-C has reached it as well."""
    worker.terminate()
    try:
        worker.wait(timeout=10)
    except subprocess.TimeoutExpired:
        worker.kill()


def read(file: Path) -> dict[str, Any]:
    """What a work has written so far."""
    empty = {"about": "", "said": "interrupted", "cases": []}
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else empty


def with_shares(works: dict[str, Any]) -> None:
    """Adds to every case with known amounts the share of the machine's ceilings that ours reaches: the time that they
    take at the ceilings, one after the other, over the time that it took."""
    rows = [row for case in works.get("ceilings", {}).get("cases", []) for row in case["numbers"]]
    most = {row["id"].partition("/")[2]: row["value"] for row in rows}
    for record in works.values():
        for case in record["cases"]:
            seconds = case["contenders"].get("ours", {}).get("min_s")
            if case["amounts"] and seconds and all(most.get(name) for name in case["amounts"]):
                least = sum(amount / most[name] for name, amount in case["amounts"].items())
                case["share_of_ceilings"] = least / seconds


def missed(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers with a floor that is not met."""
    return [row for row in numbers(result) if row.get("met") is False]


def numbers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All numbers of all works but the ceilings."""
    works = [record for name, record in result["works"].items() if name != "ceilings"]
    return [row for record in works for case in record["cases"] for row in case["numbers"]]


def broken(result: dict[str, Any]) -> list[str]:
    """Works that failed and numbers refused because contenders disagree: what must not pass unseen."""
    failed = [f"{name} {r['said']}" for name, r in result["works"].items() if r["said"].startswith("failed")]
    refused = [f"{row['id']} refused: {row['refused']}" for row in numbers(result) if row["refused"]]
    return failed + [line for line in refused if "not available" not in line]


def unmeasured(result: dict[str, Any]) -> list[str]:
    """Floors for which there is no value in this result."""
    have = {row["id"] for row in numbers(result) if row["value"] is not None}
    return [id for id in FLOORS if id not in have]
