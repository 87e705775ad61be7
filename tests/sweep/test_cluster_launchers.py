"""Runs on a Ray cluster that loses a node, and in arrays of submitit's local executor."""

import os
import signal
import sys
import time

import pytest

from sparsemix.checkpoint import steps
from sparsemix.config import ConfigError
from sparsemix.run import Run
from sparsemix.sweep import jobs
from sparsemix.sweep.jobs import Job, train_job
from sparsemix.sweep.launch import WorkerLostError, make_launcher, stop_file
from tiny import prepared, run_config

STEPS = 10


def paused_train_job(job):
    """In a worker: `train_job`, which waits after step 3 until there is a file `go`."""
    check = jobs.check_stop

    def wait(line=None):
        while line is not None and line["step"] == 3 and not (job.folder.parent / "go").exists():
            time.sleep(0.05)
            check(line)
        check(line)

    jobs.check_stop = wait
    try:
        return train_job(job)
    finally:
        jobs.check_stop = check


def at_step_3(job):
    return (job.folder / "metrics.jsonl").exists() and len(list(Run(job.folder).metrics())) == 3


@pytest.fixture
def two_jobs(tmp_path):
    data, shards = prepared(tmp_path)
    config = run_config(data, "dense", STEPS, evals=0, checkpoint_s=0)
    return [Job(config.replace(seed=seed), tmp_path / f"run-{seed}", shards.folder) for seed in (0, 1)]


def assert_same_as_undisturbed(job):
    whole = job._replace(folder=job.folder.with_name(f"{job.folder.name}-whole"))
    train_job(whole)
    one, other = ((folder / "model" / "model.safetensors").read_bytes() for folder in (job.folder, whole.folder))
    assert one == other
    assert [line["step"] for line in Run(job.folder).metrics()] == list(range(1, STEPS + 1))


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes, of one processor each, on this machine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Workers have this package, but not its tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def test_a_ray_cluster_that_loses_a_node_in_mid_run_ends_with_the_same_bits(cluster, two_jobs, tmp_path):
    killed = []

    def watch():
        if not killed and all(map(at_step_3, two_jobs)):
            # Each node has one of the runs; the second is lost for good.
            killed.append(cluster.second)
            cluster.remove_node(cluster.second, allow_graceful=False)
            (tmp_path / "go").touch()

    with make_launcher("ray", tmp_path, [f"address={cluster.address}"]) as workers:
        assert (workers.workers, workers.threads) == (2, 1)
        ended = dict(workers.map(paused_train_job, [(job,) for job in two_jobs], watch))
    assert killed, ended
    assert [ended[i]["seed"] for i in (0, 1)] == [0, 1]
    for job in two_jobs:
        assert_same_as_undisturbed(job)


@pytest.fixture
def by_value():
    """Submitted functions travel whole: workers have this package, but not its tests."""
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def train_or_die(job):
    """In a worker: `train_job`, or what the kernel does when memory is short."""
    if job is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_job(job)


@pytest.mark.usefixtures("by_value")
def test_an_array_of_submitit_jobs_trains_and_one_that_dies_stops_no_other(two_jobs, tmp_path):
    pytest.importorskip("submitit")
    with make_launcher("slurm", tmp_path, ["executor=local", "minutes=5"], workers=2) as workers:
        assert (workers.workers, workers.threads) == (2, 1)
        ended = dict(workers.map(train_or_die, [(two_jobs[0],), (None,)], lambda: None))
    assert ended[0]["seed"] == 0
    assert isinstance(ended[1], WorkerLostError) and "has not produced any output" in str(ended[1])
    assert_same_as_undisturbed(two_jobs[0])


@pytest.mark.usefixtures("by_value")
def test_leaving_a_cluster_launcher_with_an_exception_lets_its_runs_save(two_jobs, tmp_path, monkeypatch):
    pytest.importorskip("submitit")

    def ctrl_c():
        if at_step_3(two_jobs[0]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), make_launcher("slurm", tmp_path, ["executor=local"]) as workers:
        list(workers.map(paused_train_job, [(two_jobs[0],)], ctrl_c))
    assert steps(two_jobs[0].folder / "checkpoints")[0].name == "step-00000003"
    assert Run(two_jobs[0].folder).result is None and not Run(two_jobs[0].folder).busy
    assert not list((tmp_path / ".slurm").glob("stop-*"))


SBATCH = """#!/bin/sh
cp "$1" {folder}/script
echo Submitted batch job 12
"""


def test_what_sbatch_is_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    for name in ("sbatch", "srun", "sacct", "scancel"):
        (tmp_path / name).write_text(SBATCH.format(folder=tmp_path) if name == "sbatch" else "#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ConfigError, match="finds no sbatch here"):
        make_launcher("slurm", tmp_path / "study")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = ["partition=short", "account=lab", "minutes=90", "gpus=1", "memory_gib=12", "threads=4"]
    workers = make_launcher("slurm", tmp_path / "study", settings, workers=1)
    # Nobody answers for the jobs: they are submitted, and that is all.
    monkeypatch.setattr("submitit.SlurmJob.done", lambda *_: True)
    monkeypatch.setattr("submitit.SlurmJob.exception", lambda *_: None)
    monkeypatch.setattr("submitit.SlurmJob.result", lambda job: job.job_id)
    assert dict(workers.map(int, [("1",), ("2",)], lambda: None)) == {0: "12_0", 1: "12_1"}
    asked = {line.removeprefix("#SBATCH --") for line in (tmp_path / "script").read_text().splitlines()}
    expected = ["array=0-1%1", "partition=short", "account=lab", "time=90", "gpus-per-node=1", "mem=12GB"]
    assert asked >= {*expected, "cpus-per-task=4", "job-name=sparsemix"}


def test_a_missing_package_or_cluster_is_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    for name, package in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"launcher={name} needs .*; pip install 'sparsemix\[{name}\]'"):
            make_launcher(name, tmp_path)


def test_a_stop_file_is_looked_for_now_and_then_and_then_heeded(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_file, "LOOK_EVERY_S", 0.0)
    stop = stop_file.new_stop_file(tmp_path / ".ray")
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(jobs, "_stopped", None)

    def work(times):
        for i in range(times):
            jobs.check_stop()
            if i == 1:
                stop.touch()
        return times

    try:
        assert isinstance(stop_file.work_until(stop, 1, work, (5,)), KeyboardInterrupt)
        stop.unlink()
        assert stop_file.work_until(stop, 1, work, (1,)) == 1
    finally:
        signal.signal(signal.SIGINT, before)
