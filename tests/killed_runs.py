"""Trains the same run again and again, each time in a new process that SIGKILLs itself, and at last to its end.

usage: killed_runs.py SHARDS FOLDER CONFIG KILL... ; KILL is NAME:COUNT, the moment before the COUNTth call of NAME.
A process that dies inside `optimizer_file` leaves half a file. Prints one line per death: the signal, the newest
checkpoint, the half-written folders."""

import os
import signal
import sys
from pathlib import Path

import torch
import yaml

from sparsemix import checkpoint, train
from sparsemix.config import parse
from sparsemix.data import Shards
from sparsemix.run import Run
from sparsemix.settings import RunConfig


def die(half_written: Path | None = None) -> None:
    if half_written is not None:
        half_written.write_bytes(b"\x40\0\0\0\0\0\0\0half")
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Replace the named function by one that dies when it is called for the COUNTth time."""
    name, count = moment.split(":")
    owner, attribute = {
        "train_step": (train, "train_step"),
        "optimizer_step": (torch.optim.AdamW, "step"),
        "log": (Run, "log"),
        "rewind": (Run, "rewind"),
        "weights_file": (checkpoint, "save_weights"),
        "optimizer_file": (checkpoint, "save_file"),
        "rename": (Path, "replace"),
        "validation": (train, "validation_bpb"),
        "evaluate": (train, "evaluate"),
    }[name]
    real, calls = getattr(owner, attribute), 0

    def armed(*args, **kwargs):
        nonlocal calls
        # save_file writes weights too.
        calls += name != "optimizer_file" or Path(args[1]).name == "optimizer.safetensors"
        if calls == int(count):
            die(args[1] if name == "optimizer_file" else None)
        return real(*args, **kwargs)

    setattr(owner, attribute, armed)


def main() -> None:
    shards_folder, folder, config_path = (Path(a) for a in sys.argv[1:4])
    torch.set_num_threads(1)
    # What torch imports late is imported once, before the processes part.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    config = parse(RunConfig, yaml.safe_load(config_path.read_text(encoding="utf-8")))
    for moment in [*sys.argv[4:], None]:
        child = os.fork()
        if child == 0:
            if moment:
                arm(moment)
            train.train(config, folder, Shards.open(shards_folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        names = sorted(path.name for path in (folder / "checkpoints").glob("*"))
        whole = [name for name in names if name.startswith("step-")]
        half = [name for name in names if name.startswith(".")]
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
        print(moment, ended, ",".join(whole), len(half), flush=True)


if __name__ == "__main__":
    main()
