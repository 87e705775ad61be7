"""One process at a time trains a run; the lock goes with its holder, however that ends."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparsemix import checkpoint, run, train
from sparsemix.durable import write_atomic
from sparsemix.errors import RunBusyError
from sparsemix.run import LOCK, Run, is_locked, locked
from tiny import prepared, result_of, run_config, unchecked_shapes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no advisory locks")
HOLD = """
import sys, time
from pathlib import Path
from sparsemix.run import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock in tmp_path."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / LOCK], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_lock_names_its_holder_and_is_free_when_that_was_killed(holder, tmp_path):
    assert is_locked(tmp_path / LOCK) and is_locked(tmp_path / LOCK)
    with pytest.raises(RunBusyError, match=f"process {holder.pid} on .*; wait for it"), locked(tmp_path / LOCK, 0.1):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not is_locked(tmp_path / LOCK)
    with locked(tmp_path / LOCK, 0.0):
        assert is_locked(tmp_path / LOCK)


def test_a_run_that_another_process_trains_is_left_alone(holder, tmp_path, monkeypatch):
    (tmp_path / ".corpus").mkdir()
    data, shards = prepared(tmp_path / ".corpus")
    monkeypatch.setattr(run, "LOCK_WAIT_S", 0.1)
    config = run_config(data)
    with unchecked_shapes(), pytest.raises(RunBusyError, match=str(holder.pid)):
        train.train(config, tmp_path, shards)
    assert Run(tmp_path).busy and not (tmp_path / "metrics.jsonl").exists()
    holder.kill()
    holder.wait()
    with unchecked_shapes():
        assert result_of(config, tmp_path, shards)["steps"] == 4
    assert not Run(tmp_path).busy


@pytest.mark.parametrize("moment", ["weights", "line", "result"])
def test_a_disk_that_fills_is_named_and_what_was_saved_goes_on_to_the_same_bits(tmp_path, monkeypatch, moment):
    with unchecked_shapes():
        data, shards = prepared(tmp_path)
        config = run_config(data, checkpoint_s=0)
        train.train(config, tmp_path / "whole", shards)
        calls = []

        def full(real, error):
            def maybe(*args, **kwargs):
                calls.append(1)
                if len(calls) == 3 or moment == "result":
                    raise error
                return real(*args, **kwargs)

            return maybe

        no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")
        owner, name, error = {
            # safetensors has an error of its own, which names the system's by its number.
            "weights": (checkpoint, "save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
            "line": (Run, "log", no_space),
            "result": (Run, "finish", no_space),
        }[moment]
        monkeypatch.setattr(owner, name, full(getattr(owner, name), error))
        with pytest.raises(OSError, match="No space left") as raised:
            train.train(config, tmp_path / "full", shards)
        assert raised.value.errno == errno.ENOSPC
        monkeypatch.undo()
        assert any((tmp_path / "full" / "checkpoints").glob("step-*"))
        assert result_of(config, tmp_path / "full", shards)["steps"] == 4
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "full"))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_file_that_could_not_be_written_leaves_no_part_of_it(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomic(tmp_path / "plan.yaml", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "plan.yaml", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    assert (tmp_path / "plan.yaml").read_text(encoding="utf-8") == "old"
