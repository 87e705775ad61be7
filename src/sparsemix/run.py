"""Run = a folder: config.yaml, metrics.jsonl, checkpoints/, model/, result.json. No torch here."""

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsemix.config import Config, ConfigError, parse, to_yaml
from sparsemix.durable import SEAL, damage, seal, undone, write_atomic
from sparsemix.errors import DIVERGED, DamagedError, RunBusyError
from sparsemix.inputs import read_mapping, trusted

if TYPE_CHECKING:
    import numpy as np

# Who only looks whether a lock is held takes it for a moment; so does a process that is just being killed.
LOCK_WAIT_S = 2.0
LOCK = ".lock"
# What a run keeps of its newest failure, for `sparsemix status` and for whoever looks for the cause.
ERROR = "error.txt"
# What later commands read of a finished run, and its checksums are of.
TRUSTED = ("config.yaml", "metrics.jsonl", "documents.npz", "result.json")


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
        begun = (folder / "config.yaml").is_file()
        if begun and not self._holds(config):
            raise ConfigError(f"{folder} holds a run with other settings; choose another folder or delete it")
        refuse_foreign(folder, "run")
        if not begun:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "config.yaml", to_yaml(config))

    def _holds(self, config: Config) -> bool:
        """Are these the folder's settings? One that is younger than the folder counts with its default."""
        there = self.settings
        try:
            return parse(type(config), there) == config
        except ConfigError:
            return False

    @property
    def settings(self) -> dict[str, Any]:
        """What config.yaml holds. Raises DamagedError."""
        return read_mapping(self.folder / "config.yaml")

    @property
    def result(self) -> dict[str, Any] | None:
        """The run's result, or None while it is unfinished. Raises DamagedError."""
        path = self.folder / "result.json"
        return read_mapping(path) if path.exists() else None

    def check(self, names: Collection[str] | None = None) -> None:
        """Raises DamagedError where a file of a finished run, or one of these, is not what the run wrote; runs of
        earlier versions have no checksums."""
        _refuse_damaged(self.folder, names)

    def lock(self) -> AbstractContextManager[None]:
        """Held while the run is trained. Raises RunBusyError where another process trains it."""
        return locked(self.folder / LOCK, LOCK_WAIT_S)

    @property
    def diverged(self) -> str | None:
        """Why the run has no loss, in words, where it is known to have diverged in training and none is trying again:
        that is a result too."""
        if not (self.folder / ERROR).is_file() or (self.folder / "result.json").exists() or self.busy:
            return None
        first = (self.folder / ERROR).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        return first.partition(" (")[0] if DIVERGED in first else None

    @property
    def busy(self) -> bool:
        """Does a process train it just now?"""
        return is_locked(self.folder / LOCK)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, with which the run is finished, and the checksums of what it wrote."""
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1))
        seal(self.folder, [name for name in TRUSTED if (self.folder / name).is_file()])

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged lines; a last line that a killed process left half-written is left out. Raises DamagedError."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            self.check([path.name])
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                if not isinstance(read := json.loads(line), dict):
                    raise ValueError
            except (ValueError, RecursionError):
                # What follows the last newline was not written to its end.
                if number == len(lines):
                    return
                raise DamagedError(
                    f"{path} is damaged in line {number}; copy the file anew, or delete that line"
                ) from None
            yield read

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run logs it again. Raises DamagedError."""
        if (self.folder / "metrics.jsonl").is_file():
            kept = [json.dumps(line) + "\n" for line in self.metrics() if line.get("step", 0) <= step]
            write_atomic(self.folder / "metrics.jsonl", "".join(kept))

    def log(self, **values: Any) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _refuse_damaged(folder: Path, names: Collection[str] | None) -> None:
    if (folder / SEAL).is_file() and (told := damage(folder, names)):
        raise DamagedError(
            f"{folder} is damaged: {told}; copy it anew, or delete {SEAL} in it to have what is there read"
        )


# What tells that a folder holds a run, or a comparison or study, and what may stand there before it.
_MARKS = {"run": ("config.yaml", ()), "comparison": ("plan.yaml", ("data",)), "study": ("plan.yaml", ("data",))}


def refuse_foreign(folder: Path, what: str) -> None:
    """Raises ConfigError where the folder holds something, and no `run`, `comparison` or `study`."""
    mark, before = _MARKS[what]
    if (folder / mark).is_file() or not folder.exists():
        return
    # What is hidden may be another process's, which is just making the same, or a killed one's.
    if not folder.is_dir() or any(path.name not in before and path.name[0] != "." for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no {what}; choose another folder")


def refuse_other(folder: Path, config: Config) -> None:
    """Raises ConfigError where the folder holds another run than one of these settings, before its text is known."""
    refuse_foreign(folder, "run")
    if (folder / "config.yaml").is_file():
        there, asked = Run(folder).settings.get("data"), config.model_dump(mode="json")
        asked["data"] |= {"fingerprint": there.get("fingerprint") if isinstance(there, dict) else None}
        Run(folder, parse(type(config), asked))


def refusal_leaves_nothing(folder: Path) -> AbstractContextManager[None]:
    """What the block makes in the folder of a run or of a study is gone where it raises ConfigError before any training
    was saved: the mended command must not find another's settings or text there."""

    def when(error: BaseException) -> bool:
        refused = isinstance(error, ConfigError) and not isinstance(error, RunBusyError)
        # What another process is just making stays.
        begun = (folder / "plan.yaml").is_file() or any((folder / "checkpoints").glob("step-*"))
        return refused and not begun and not is_locked(folder / LOCK)

    return undone(folder, when)


PLAN_WAY_OUT = "copy it anew, or choose another folder and leave this one"


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write plan.yaml, whose first line is the checksum of the rest: it is written again and again while others read,
    so that a file beside it could be of another moment."""
    text = yaml.safe_dump(plan, sort_keys=False)
    write_atomic(folder / "plan.yaml", f"{_checksum(text)}\n{text}")


def read_plan(folder: Path) -> dict[str, Any]:
    """What plan.yaml holds: `settings`, and the `cells` of a study; {} where there is none. Raises DamagedError."""
    path = folder / "plan.yaml"
    if not path.exists():
        return {}
    first, _, rest = path.read_bytes().decode(errors="replace").partition("\n") if path.is_file() else ("", "", "")
    # Plans of earlier versions have no checksum.
    if first.startswith(_CHECKSUM) and first != _checksum(rest):
        raise DamagedError(f"{path} is damaged (it is not what was written); {PLAN_WAY_OUT}")
    plan = read_mapping(path, PLAN_WAY_OUT)
    cells = plan.get("cells", [])
    for cell in cells if isinstance(cells, list) else [cells]:
        for name, kind in _CELL.items():
            held = cell.get(name) if isinstance(cell, dict) else cell
            if not isinstance(held, kind) and not (held is None and name in _AT_TIMES):
                told = f"a run's {name} is {str(held)[:40]}"
                raise DamagedError(f"{path} is damaged ({told}); {PLAN_WAY_OUT}")
    if not isinstance(plan.get("settings", {}), dict):
        raise DamagedError(f"{path} is damaged (`settings` are no names and values); {PLAN_WAY_OUT}")
    return plan


# What a plan says of each run of a study; earlier versions said less.
_CELL: dict[str, type | tuple[type, ...]] = {
    "run": str,
    "arm": str,
    "role": str,
    "budget": (int, float),
    "width": int,
    "seed": int,
    "lr": (int, float),
}
_AT_TIMES = ("budget", "width", "seed", "lr")
_CHECKSUM = "# SHA-256 of what follows: "


def _checksum(text: str) -> str:
    return _CHECKSUM + hashlib.sha256(text.encode()).hexdigest()


def by_document(path: Path) -> dict[str, "np.ndarray"]:
    """What a run's documents.npz holds of every test document, such as `nats` and `bytes`. Raises DamagedError, and
    OSError where it cannot be opened."""
    import numpy as np

    _refuse_damaged(path.parent, [path.name])
    # Opened here: NumPy leaves a file open that is no archive.
    with path.open("rb") as raw, trusted(path), np.load(raw, allow_pickle=False) as held:
        return {name: held[name] for name in held.files}
