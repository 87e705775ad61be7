"""Metrics of runs in a tracker. It follows the lines that runs log in their folders, in a process of its own, so
training knows nothing of it. Nothing leaves this machine unless the tracker's own environment variables say so."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from sparsemix.config import ConfigError, nearest
from sparsemix.durable import write_atomic
from sparsemix.inputs import checked_json, read_mapping
from sparsemix.report.arm import arm_of
from sparsemix.run import Run

LOOK_EVERY_S = 2.0
# In a run's folder: the last step that each tracker was given. A resumed run logs some steps again.
TRACKED = "tracked.json"
# Where runs lie below the folder of a run, a comparison, a study, or of several studies.
PLACES = ("config.yaml", "*/config.yaml", "runs/*/config.yaml", "*/runs/*/config.yaml")

Line = tuple[int, dict[str, float]]


class Tracker(Protocol):
    """Takes (step, values) lines of named runs."""

    def log(self, name: str, settings: dict[str, Any], lines: Sequence[Line], ended: bool) -> None: ...


class TensorBoard:
    """An event file a run in OUT/tensorboard/NAME/."""

    def __init__(self, out: Path) -> None:
        self.out, self._open = out, {}

    def log(self, name: str, settings: dict[str, Any], lines: Sequence[Line], ended: bool) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if name not in self._open:
            self._open[name] = EventFileWriter(str(self.out / "tensorboard" / name))
        for step, values in lines:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            self._open[name].add_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._open[name].flush()
        if ended:
            self._open.pop(name).close()


class Wandb:
    """An offline run in OUT/wandb/, which `wandb sync` would upload."""

    def __init__(self, out: Path) -> None:
        # A library that reports its own errors home is not offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.out, self._open = out, {}

    def log(self, name: str, settings: dict[str, Any], lines: Sequence[Line], ended: bool) -> None:
        import wandb

        if name not in self._open:
            self._open[name] = wandb.init(
                project=self.out.name,
                name=name,
                id=name,
                group=arm_of(settings),
                config=settings,
                dir=str(self.out),
                mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )
        for step, values in lines:
            self._open[name].log(values, step=step)
        if ended:
            self._open.pop(name).finish()


class Trackio:
    """A run in trackio's local database (TRACKIO_DIR), for `trackio show`."""

    def __init__(self, out: Path) -> None:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        self.out = out

    def log(self, name: str, settings: dict[str, Any], lines: Sequence[Line], ended: bool) -> None:
        import trackio

        # It has one run open at a time.
        run = trackio.init(
            project=self.out.name,
            name=name,
            group=arm_of(settings),
            config=settings,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        for step, values in lines:
            run.log(values, step=step)
        trackio.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def refuse_unknown(tracker: str | None) -> None:
    """Raises ConfigError where there is no tracker of that name, or not its package; None is no tracker."""
    if tracker is None:
        return
    if tracker not in TRACKERS:
        raise ConfigError(f"track={tracker} is none of {', '.join(TRACKERS)}{nearest(tracker, TRACKERS)}")
    if find_spec(tracker) is None:
        raise ConfigError(f"track={tracker} needs the package {tracker}; pip install 'sparsemix[track]'")


@contextmanager
def tracking(tracker: str | None, out: Path) -> Iterator[None]:
    """While inside, give every run at or below the folder `out` to the tracker of that name, its log from the start if
    it was not given before; None does nothing. Raises ConfigError."""
    if tracker is None:
        yield
        return
    refuse_unknown(tracker)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_process, args=(tracker, out.resolve(), theirs))
    process.start()
    theirs.close()
    try:
        yield
    finally:
        told = "its process was killed"
        with suppress(OSError, EOFError):
            ours.send("end")
            told = ours.recv()
        process.join()
        if told:
            # The runs are whole without it.
            print(f"sparsemix: {tracker} did not get all metrics: {told}", file=sys.stderr)


def _process(tracker: str, out: Path, connection: Connection) -> None:
    # The terminal sends Ctrl-C to every process; this one ends when the launching one does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = None
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            follower = Follower(TRACKERS[tracker](out), tracker, out)
            while not connection.poll(LOOK_EVERY_S):
                follower.look()
            follower.look(last=True)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    with suppress(OSError):
        connection.send(told)


class Follower:
    """Hands each logged step of the runs below a folder to a tracker, once, over any number of processes."""

    def __init__(self, tracker: Tracker, name: str, out: Path) -> None:
        self.tracker, self.name, self.out = tracker, name, out
        self._seen: dict[Path, int] = {}
        self._open: set[Path] = set()
        self._ended: set[Path] = set()

    def look(self, last: bool = False) -> None:
        """Hand over what is new; with `last`, close what is open."""
        for pattern in PLACES:
            for path in sorted(self.out.glob(pattern)):
                if path.parent not in self._ended:
                    self._follow(Run(path.parent), last)

    def _follow(self, run: Run, last: bool) -> None:
        log, result = run.folder / "metrics.jsonl", run.result
        if not log.is_file() or (log.stat().st_mtime_ns == self._seen.get(run.folder) and not (result or last)):
            return
        self._seen[run.folder] = log.stat().st_mtime_ns
        given = self._given(run)
        lines = [
            (line["step"], {name: value for name, value in line.items() if name != "step"})
            for line in run.metrics()
            if line["step"] > given.get("step", 0)
        ]
        if result is not None and not given.get("result"):
            lines.append((result["steps"], {"test_bpb": result["bpb"], "test_perplexity": result["perplexity"]}))
        ended = result is not None or last
        if lines:
            self._give(run, {"step": lines[-1][0], "result": result is not None})
        if lines or (ended and run.folder in self._open):
            self.tracker.log(self._label(run), run.settings, lines, ended)
            self._open.add(run.folder)
        if ended:
            self._open.discard(run.folder)
            self._ended.add(run.folder)

    def _given(self, run: Run) -> dict[str, Any]:
        return _tracked(run).get(self.name, {})

    def _give(self, run: Run, given: dict[str, Any]) -> None:
        """Noted before it is done: a tracker that is killed in between lacks a few steps, and has none twice."""
        write_atomic(run.folder / TRACKED, checked_json({**_tracked(run), self.name: given}))

    def _label(self, run: Run) -> str:
        if run.folder == self.out:
            return self.out.name
        # In a study a folder is named by a hash alone.
        settings = run.settings
        hashed = run.folder.parent.name == "runs"
        return f"{arm_of(settings)}-{settings['seed']}-{run.folder.name}" if hashed else run.folder.name


def _tracked(run: Run) -> dict[str, Any]:
    """What each tracker was given of a run."""
    path = run.folder / TRACKED
    return read_mapping(path, "delete it to have the run given from its start") if path.is_file() else {}
