import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sparsemix.config import ConfigError
from sparsemix.memory import available_bytes, run_bytes
from sparsemix.run import Run
from sparsemix.sweep import jobs
from sparsemix.sweep.jobs import Job, probe_job, train_job
from sparsemix.sweep.launch import WorkerLostError, local, make_launcher
from sparsemix.sweep.memory import needed_bytes
from sparsemix.sweep.rounds import train_all
from tiny import prepared, run_config

STEPS = 20


def launcher(workers=1, *settings):
    return make_launcher("local", Path("unused"), ("threads=1", *settings), workers)


def slow_train_job(job):
    """In a worker: `train_job` with steps long enough to be interrupted between two of them."""
    check = jobs.check_stop

    def slow(line=None):
        time.sleep(0.1)
        check(line)

    jobs.check_stop = slow
    return train_job(job)


def killed_at_step_5(job):
    """In a worker: `train_job`, which the kernel kills in the middle; only where nothing was trained yet."""
    first, check = not (job.folder / "metrics.jsonl").exists(), jobs.check_stop

    def dies(line=None):
        if first and line is not None and line["step"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        check(line)

    jobs.check_stop = dies
    return train_job(job)


def raises_what_cannot_be_sent():
    raise type("Local", (Exception,), {})("from a class that no other process has")


def exits():
    os._exit(3)


def waits(name, folder, seconds, memory):
    (folder / name).write_text("", encoding="utf-8")
    time.sleep(seconds)
    return sorted(path.name for path in folder.iterdir())


def memory_of(config, data):
    """Peak memory of three training steps beyond what the process has at its start, in bytes."""
    from sparsemix.evaluate.memory import PeakMemory

    peak = PeakMemory()
    before = peak.bytes()
    probe_job(config, data, 3)
    return peak.bytes() - before


class Watcher:
    def __init__(self, look=lambda: None):
        self.look, self.ended = look, []

    def __call__(self):
        self.look()

    def done(self, folder):
        self.ended.append(folder.name)


@pytest.fixture(scope="module")
def prepared_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    data, shards = prepared(folder)
    return run_config(data, "dense", STEPS, evals=0, checkpoint_s=1e6), shards


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_leaving_with_an_exception_saves_a_checkpoint_and_the_next_call_ends_with_the_same_bits(prepared_run, tmp_path):
    config, shards = prepared_run
    unbroken, stopped = (Job(config, tmp_path / name, shards.folder) for name in ("unbroken", "stopped"))
    waiting = Job(config.replace(seed=1), tmp_path / "waiting", shards.folder)

    def ctrl_c():
        if (stopped.folder / "metrics.jsonl").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), launcher() as workers:
        list(workers.map(slow_train_job, [(stopped,), (waiting,)], ctrl_c))
    newest = max((stopped.folder / "checkpoints").iterdir())
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())
    assert 0 < int(newest.name.removeprefix("step-")) < STEPS
    assert Run(stopped.folder).result is None and not list((waiting.folder / "checkpoints").glob("*"))
    assert train_job(stopped)["steps"] == train_job(unbroken)["steps"] == STEPS
    assert weights(stopped.folder) == weights(unbroken.folder)


def test_a_run_killed_in_the_middle_stops_no_other_and_ends_with_the_same_bits(prepared_run, tmp_path, monkeypatch):
    config, shards = prepared_run
    config = run_config(config.data, "dense", 8, evals=0, checkpoint_s=0)
    killed, other = (Job(config.replace(seed=s), tmp_path / f"run-{s}", shards.folder) for s in (0, 1))
    said, watcher = [], Watcher()
    monkeypatch.setattr("sparsemix.sweep.rounds.train_job", killed_at_step_5)
    with launcher(2) as workers:
        assert train_all([killed, other], workers, watcher, said.append, retries=0).keys() == {
            killed.folder,
            other.folder,
        }
        assert max((killed.folder / "checkpoints").glob("step-*")).name == "step-00000004"
        assert "killed by SIGKILL (out of memory?)" in (killed.folder / jobs.ERROR).read_text(encoding="utf-8")
        fresh = Job(config.replace(seed=2), tmp_path / "run-2", shards.folder)
        assert not train_all([killed, other, fresh], workers, watcher, said.append)
    assert said == ["run-2: killed by SIGKILL (out of memory?); it goes on from its last checkpoint"]
    assert sorted(watcher.ended) == ["run-0", "run-0", "run-1", "run-1", "run-2"]
    assert not (killed.folder / jobs.ERROR).exists()
    whole = killed._replace(folder=tmp_path / "whole")
    train_job(whole)
    assert weights(killed.folder) == weights(whole.folder)


def test_results_exceptions_and_deaths_come_back_as_what_they_are(prepared_run):
    config, shards = prepared_run
    with launcher(2) as workers:
        watched = []
        outcomes = dict(workers.map(int, [("7",), ("seven",), ("8",)], lambda: watched.append(1)))
        assert outcomes[0] == 7 and outcomes[2] == 8 and watched
        assert isinstance(outcomes[1], ValueError) and "seven" in str(outcomes[1])
        assert "in outcome" in outcomes[1].__notes__[0]
        ((_, (step_s, token_s)),) = workers.map(probe_job, [(config, shards.folder, 3)], lambda: None)
        assert 0 < token_s < step_s
        killed = dict(workers.map(signal.raise_signal, [(signal.SIGKILL,), (signal.SIGTERM,)], lambda: None))
        assert [str(killed[i]) for i in (0, 1)] == ["killed by SIGKILL (out of memory?)", "killed by SIGTERM"]
        assert all(isinstance(error, WorkerLostError) for error in killed.values())
        ((_, odd),) = workers.map(raises_what_cannot_be_sent, [()], lambda: None)
        assert type(odd) is RuntimeError and "Local: from a class" in str(odd)
        ((_, gone),) = workers.map(exits, [()], lambda: None)
        assert "exit code 3" in str(gone)
        assert dict(workers.map(abs, [], lambda: None)) == {}


def test_a_job_starts_only_when_it_fits_beside_the_others_and_alone_it_always_may(tmp_path, monkeypatch):
    sizes = {"big": 3, "huge": 9, "small": 1, "tiny": 1}
    monkeypatch.setattr(local, "needed_bytes", lambda args: args[3])
    with launcher(4, f"memory_gib={4 / 2**30}") as workers:
        work = [(name, tmp_path, 0.3, size) for name, size in sizes.items()]
        seen = {work[i][0]: there for i, there in workers.map(waits, work, lambda: None)}
    # `small` fits beside `big`; `tiny` would be one too many; `huge` waits until nothing else runs.
    assert "huge" not in seen["big"] and "small" in seen["big"] and "tiny" not in seen["big"]
    assert seen["huge"] == sorted(sizes)


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_the_estimated_memory_of_a_run_is_near_its_measured_peak(prepared_run, kind):
    data, shards = prepared_run[0].data, prepared_run[1]
    # Enough tokens that activations, not the process, are most of it.
    config = run_config(data, kind, 2, batch_tokens=2**15)
    with launcher() as workers:
        ((_, measured),) = workers.map(memory_of, [(config, shards.folder)], lambda: None)
    assert measured < run_bytes(config) < 2 * measured
    assert needed_bytes((config, shards.folder, 3)) == needed_bytes((Job(config, shards.folder, shards.folder),))
    assert needed_bytes(("7",)) == 0
    assert 2**20 < available_bytes() < 2**50


def test_outside_a_worker_nothing_stops_a_run_and_a_worker_stops_when_its_parent_is_gone(monkeypatch):
    jobs.check_stop({"step": 1})
    here, there = local.multiprocessing.Pipe()
    monkeypatch.setattr(jobs, "_stopped", there.poll)
    jobs.check_stop()
    here.close()
    with pytest.raises(KeyboardInterrupt):
        jobs.check_stop()


def test_a_launcher_of_no_known_name_or_setting_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match="launcher=slrum is none of local, ray, slurm; did you mean 'slurm'"):
        make_launcher("slrum", Path("unused"))
    with pytest.raises(ConfigError, match="thread=2 is no setting here; did you mean 'threads'"):
        make_launcher("local", Path("unused"), ["thread=2"])
    with pytest.raises(ConfigError, match="workers=0"):
        make_launcher("local", Path("unused"), workers=0)
