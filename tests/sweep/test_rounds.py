"""Runs that end badly are named, and stop no other."""

import pytest

from sparsemix.errors import DamagedError, OutOfMemoryError, TrainingError
from sparsemix.run import Run
from sparsemix.signals import Terminated
from sparsemix.sweep.jobs import ERROR, Job, WorkerLostError, measured, outcome
from sparsemix.sweep.rounds import train_all
from sparsemix.sweep.status import look
from sparsemix.sweep.watch import Watch
from tiny import run_config, write_corpus


class Ends:
    """A launcher whose workers end as it is told, and of whom the others finish."""

    workers = threads = 1

    def __init__(self, ends):
        self.ends, self.tried = ends, []

    def map(self, work, jobs, watch):
        for i, (job,) in enumerate(jobs):
            self.tried.append(job.folder.name)
            told = self.ends.get(job.folder.name)
            if told is None:
                Run(job.folder, job.config).finish({"bpb": 1.0, "validation_bpb": 1.0})
            yield i, told
            watch()


@pytest.mark.parametrize(
    ("error", "tries"),
    [(WorkerLostError("killed by SIGKILL"), 2), (OutOfMemoryError("no memory"), 2), (DamagedError("x is damaged"), 1)],
    ids=["lost", "memory", "damaged"],
)
def test_a_worker_that_dies_before_its_folder_exists_is_a_named_failed_run(tmp_path, error, tries):
    config, said = run_config(write_corpus(tmp_path)), []
    jobs = [Job(config.replace(seed=seed), tmp_path / f"run-{seed}", tmp_path / "data") for seed in range(3)]
    launcher = Ends({"run-1": error})
    with Watch([job.folder for job in jobs], "training", said.append) as watch:
        assert train_all(jobs, launcher, watch, said.append) == {jobs[1].folder: error}
    assert launcher.tried.count("run-1") == tries and launcher.tried.count("run-2") == 1
    assert any("run-1 failed" in line for line in said) and "no more" not in " ".join(said)
    shown = look(jobs[1].folder, {})
    assert (shown.state, shown.said, shown.seed) == ("failed", str(error), 1)
    assert (jobs[1].folder / ERROR).read_text() == f"{error}\n"
    # The same command tries it again.
    with Watch([job.folder for job in jobs], "training", said.append) as watch:
        assert not train_all(jobs, Ends({}), watch, said.append)


def test_a_finished_run_whose_files_changed_is_a_named_failed_run(tmp_path):
    config, said = run_config(write_corpus(tmp_path)), []
    jobs = [Job(config.replace(seed=seed), tmp_path / f"run-{seed}", tmp_path / "data") for seed in range(2)]
    for job in jobs:
        Run(job.folder, job.config).finish({"bpb": 1.0, "validation_bpb": 1.0})
    path = jobs[0].folder / "result.json"
    path.write_text(path.read_text().replace("1.0", "2.0", 1))
    with Watch([job.folder for job in jobs], "training", said.append) as watch:
        (failed,) = train_all(jobs, Ends({}), watch, said.append).items()
    assert failed[0] == jobs[0].folder and "result.json is not what was written" in str(failed[1])


def test_a_worker_ended_by_sigterm_is_a_lost_one_and_a_lost_measurement_is_named():
    def ended():
        raise Terminated

    told = outcome(ended, ())
    assert isinstance(told, WorkerLostError)
    with pytest.raises(TrainingError, match="measuring moe: killed by SIGTERM"):
        measured(told, "moe")
