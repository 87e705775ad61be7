"""What trackers hold of runs, read back from their own files."""

import json
import sqlite3
import subprocess
import sys

import pytest

from sparsemix.config import ConfigError
from sparsemix.inputs import read_mapping
from sparsemix.run import Run
from sparsemix.track import TRACKED, Follower, TensorBoard, tracking
from tiny import run_config, write_corpus


def make_run(folder, tmp_path, seed=0):
    return Run(folder, run_config(write_corpus(tmp_path), "moe", seed=seed))


def log(run, steps):
    for step in steps:
        run.log(step=step, loss=6.0 - step, flops=1e6 * step)


RESULT = {"steps": 6, "bpb": 2.5, "perplexity": 20.0}


class Seen:
    """A tracker that remembers what it was given."""

    def __init__(self):
        self.lines, self.ended = {}, []

    def log(self, name, settings, lines, ended):
        assert settings["model"]["d_model"] == 16
        self.lines.setdefault(name, []).extend(lines)
        self.ended += [name] * ended


def test_a_run_that_was_killed_and_resumed_is_given_no_step_twice(tmp_path):
    run, out = make_run(tmp_path / "study" / "runs" / "0123456789", tmp_path), tmp_path / "study"
    seen = Seen()
    follower = Follower(seen, "wandb", out)
    log(run, [1, 2, 3, 4])
    follower.look()
    follower.look()
    # Killed after its checkpoint of step 2, and the tracker with it.
    run.rewind(2)
    follower = Follower(seen, "wandb", out)
    log(run, [3])
    follower.look()
    log(run, [4, 5, 6])
    follower.look()
    run.finish(RESULT)
    follower.look()
    Follower(seen, "wandb", out).look(last=True)
    ((name, lines),) = seen.lines.items()
    assert name == "moe-0-0123456789" and seen.ended == [name]
    assert [step for step, _ in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert lines[1][1] == {"loss": 4.0, "flops": 2e6} and lines[-1][1] == {"test_bpb": 2.5, "test_perplexity": 20.0}
    # Another tracker is given the whole of it.
    Follower(other := Seen(), "trackio", out).look(last=True)
    assert other.lines[name][:6] == lines[:6]
    assert read_mapping(run.folder / TRACKED).keys() == {"wandb", "trackio"}


def test_tensorboard_reads_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = [make_run(tmp_path / "out" / name, tmp_path, seed) for seed, name in enumerate(("moe-0-a", "moe-1-b"))]
    follower = Follower(TensorBoard(tmp_path / "out"), "tensorboard", tmp_path / "out")
    for run in runs:
        log(run, [1, 2])
    follower.look()
    log(runs[0], [3])
    runs[0].finish(RESULT)
    follower.look(last=True)
    for run, steps in zip(runs, ([1, 2, 3], [1, 2]), strict=True):
        read = EventAccumulator(str(tmp_path / "out" / "tensorboard" / run.folder.name)).Reload()
        assert [(e.step, e.value) for e in read.Scalars("loss")] == [(step, 6.0 - step) for step in steps]
        tags = {"loss", "flops", *(["test_bpb", "test_perplexity"] if run is runs[0] else [])}
        assert set(read.Tags()["scalars"]) == tags


TRACKED_RUN = """
import sys
from pathlib import Path
from sparsemix.run import Run
from sparsemix.track import tracking
if __name__ == "__main__":
    tracker, out = sys.argv[1], Path(sys.argv[2])
    run = Run(out)
    with tracking(tracker, out):
        for step in (1, 2, 3):
            run.log(step=step, loss=6.0 - step, flops=1e6 * step)
    assert not {"torch", "wandb", "trackio"} & set(sys.modules)
"""


def track(tracker, folder, tmp_path, monkeypatch):
    """A run of three steps under `tracking` in a process of its own, with no way out of this machine."""
    make_run(folder, tmp_path)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / "script.py").write_text(TRACKED_RUN, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "script.py"), tracker, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_wandb_holds_the_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_MODE", raising=False)
    track("wandb", tmp_path / "alone", tmp_path, monkeypatch)
    (folder,) = (tmp_path / "alone" / "wandb").glob("offline-run-*-alone")
    history = [
        r.history for data in log_records(folder / "run-alone.wandb") if (r := Record.FromString(data)).history.item
    ]
    rows = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in h.item} for h in history]
    assert [(row["_step"], row["loss"], row["flops"]) for row in rows] == [(s, 6.0 - s, 1e6 * s) for s in (1, 2, 3)]


def log_records(path):
    """The records of a LevelDB log, as wandb writes it after a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        # 1 is a whole record, 2 begins one, 3 goes on, 4 ends it.
        if kind in (1, 4):
            yield parts
            parts = b""


def test_trackio_holds_the_run_in_its_local_database(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    track("trackio", tmp_path / "alone", tmp_path, monkeypatch)
    with sqlite3.connect(tmp_path / "trackio" / "alone.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    expected = [("alone", step, {"loss": 6.0 - step, "flops": 1e6 * step}) for step in (1, 2, 3)]
    assert [(name, step, json.loads(metrics)) for name, step, metrics in rows] == expected


def test_an_unknown_or_missing_tracker_is_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    with (
        pytest.raises(ConfigError, match=r"track=tensorbord is none of .*; did you mean 'tensorboard'"),
        tracking("tensorbord", tmp_path),
    ):
        pass
    monkeypatch.setattr("sparsemix.track.find_spec", lambda _: None)
    with (
        pytest.raises(ConfigError, match=r"track=wandb needs the package wandb; pip install 'sparsemix\[track\]'"),
        tracking("wandb", tmp_path),
    ):
        pass


def test_a_tracker_that_fails_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "alone"
    log(make_run(folder, tmp_path), [1])
    (folder / "tensorboard").write_text("a file where a folder should be", encoding="utf-8")
    with tracking("tensorboard", folder):
        pass
    assert "sparsemix: tensorboard did not get all metrics: " in capfd.readouterr().err
    with tracking(None, folder):
        pass
