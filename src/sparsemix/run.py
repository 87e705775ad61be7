"""Run = a folder: config.yaml, metrics.jsonl, checkpoints/, model/, result.json. No torch here."""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from sparsemix.config import Config, ConfigError, parse, to_yaml
from sparsemix.durable import write_atomic
from sparsemix.errors import RunBusyError
from sparsemix.inputs import load_json, load_yaml

# Who only looks whether a lock is held takes it for a moment; so does a process that is just being killed.
LOCK_WAIT_S = 2.0
LOCK = ".lock"


# How the FLOPs of every run are counted. Runs that hold no convention are from before results did, and were
# counted so too: whoever changes it keeps this text for them.
CONVENTION = (
    "FLOPs count matrix multiplies, 2 per multiply-add: linear layers, attention scores and values over the full "
    "square of the sequence, routers, predictors, experts (looked-up rows: PEER 4 * heads * top_k * d_model "
    "a token, PKM half of that), and the logits. Index reads, norms, softmax and the embedding lookup count 0. "
    "Training costs 3 x forward; where routing decides what runs, what ran is charged."
)


@contextmanager
def locked(path: Path, wait_s: float = float("inf")) -> Iterator[None]:
    """Hold the lock of the file `path`, which other processes on this file system respect. The system frees it when
    its holder ends, however that is. Windows has no such locks: nothing is held there.

    Raises RunBusyError if somebody else has held it for `wait_s` seconds."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("a+", encoding="utf-8") as file:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began >= wait_s:
                    file.seek(0)
                    raise RunBusyError(
                        f"{path.parent} is being written by {file.read().strip() or 'another process'}; wait for it, "
                        "or choose another folder"
                    ) from None
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Does a process hold the lock of this file?"""
    if sys.platform == "win32" or not path.is_file():
        return False
    import fcntl

    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Run:
    """One training run's folder. Opening it writes config.yaml, or checks that it holds the same settings."""

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        self.folder = folder
        if config is None:
            if not (folder / "config.yaml").is_file():
                raise ConfigError(f"{folder} is no run folder: it has no config.yaml; name a folder that a run wrote")
            return
        if (folder / "config.yaml").is_file():
            if not self._holds(config):
                raise ConfigError(f"{folder} holds a run with other settings; choose another folder or delete it")
        # What is hidden may be another process's, which is just making the same run.
        elif folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and holds no run; choose another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "config.yaml", to_yaml(config))

    def _holds(self, config: Config) -> bool:
        """Are these the folder's settings? One that is younger than the folder counts with its default."""
        try:
            return parse(type(config), self.settings) == config
        except ConfigError:
            return False

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings. Raises ConfigError where the file is damaged."""
        return load_yaml(self.folder / "config.yaml")

    @property
    def result(self) -> dict[str, Any] | None:
        """The run's result, or None while it is unfinished. Raises ConfigError where the file is damaged."""
        path = self.folder / "result.json"
        return load_json(path) if path.exists() else None

    def lock(self) -> AbstractContextManager[None]:
        """Held while the run is trained. Raises RunBusyError where another process trains it."""
        return locked(self.folder / LOCK, LOCK_WAIT_S)

    @property
    def busy(self) -> bool:
        """Does a process train it just now?"""
        return is_locked(self.folder / LOCK)

    def finish(self, result: dict[str, Any]) -> None:
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1))

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged lines; a last line that a killed process left half-written is left out."""
        path = self.folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run logs it again."""
        if (self.folder / "metrics.jsonl").is_file():
            kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
            write_atomic(self.folder / "metrics.jsonl", "".join(kept))

    def log(self, **values: Any) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("sparsemix", "torch", "numpy", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def hardware() -> str:
    """The processor and its cores, in words."""
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} cores"
