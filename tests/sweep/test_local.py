import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
from safetensors.torch import load_file

from sparsemix.run import Run
from sparsemix.sweep import local
from sparsemix.sweep.local import Job, pool, probe_job, train_job
from tiny import prepared, run_config

STEPS = 40


def slow_train_job(job):
    """In a worker: `train_job` with steps long enough to be interrupted between two of them."""
    check = local.check_stop

    def slow(line=None):
        time.sleep(0.1)
        check(line)

    local.check_stop = slow
    return train_job(job)


def ignore():
    pass


@pytest.fixture(scope="module")
def prepared_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    data, shards = prepared(folder)
    return run_config(data, "dense", STEPS, evals=0, checkpoint_s=1e6), shards


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_closing_gently_saves_a_checkpoint_and_the_next_call_ends_with_the_same_bits(prepared_run, tmp_path):
    config, shards = prepared_run
    unbroken, stopped = (Job(config, tmp_path / name, shards.folder) for name in ("unbroken", "stopped"))
    waiting = Job(config.replace(seed=1), tmp_path / "waiting", shards.folder)

    def ctrl_c():
        if (stopped.folder / "metrics.jsonl").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pool(1, 1) as workers:
        list(workers.map(slow_train_job, [(stopped,), (waiting,)], ctrl_c))
    (newest,) = (stopped.folder / "checkpoints").iterdir()
    assert 0 < int(newest.name.removeprefix("step-")) < STEPS
    assert Run(stopped.folder).result is None and not list((waiting.folder / "checkpoints").glob("*"))
    assert train_job(stopped)["steps"] == train_job(unbroken)["steps"] == STEPS
    assert weights(stopped.folder) == weights(unbroken.folder)
    (last,) = (stopped.folder / "checkpoints").iterdir()
    assert all(t.isfinite().all() for t in load_file(last / "model.safetensors").values())


def test_a_job_that_raises_returns_its_exception_and_a_killed_worker_breaks_the_pool(prepared_run):
    config, shards = prepared_run
    with pool(1, 1) as workers:
        watched = []
        outcomes = dict(workers.map(int, [("7",), ("seven",), ("8",)], lambda: watched.append(1)))
        assert outcomes[0] == 7 and outcomes[2] == 8 and watched
        assert isinstance(outcomes[1], ValueError) and "seven" in str(outcomes[1])
        ((_, (step_s, token_s)),) = workers.map(probe_job, [(config, shards.folder, 3)], ignore)
        assert 0 < token_s < step_s
        outcomes = dict(workers.map(signal.raise_signal, [(signal.SIGKILL,), (signal.SIGKILL,)], ignore))
        assert set(outcomes) == {0, 1}
        assert all(isinstance(outcome, BrokenProcessPool) for outcome in outcomes.values())


def test_outside_a_pool_nothing_stops_a_run(monkeypatch):
    local.check_stop({"step": 1})
    monkeypatch.setattr(local, "_parent", -1)
    local.check_stop()


def test_a_worker_whose_parent_is_gone_stops(monkeypatch):
    class Never:
        def is_set(self):
            return False

    monkeypatch.setattr(local, "_stop", Never())
    monkeypatch.setattr(local, "_parent", -1)
    with pytest.raises(KeyboardInterrupt):
        local.check_stop()
