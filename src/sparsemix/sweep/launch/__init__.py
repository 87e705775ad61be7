"""Launchers behind one interface: processes of this machine, tasks of a Ray cluster, arrays of Slurm jobs.

Each sees the same files as who launches: a study's folder lies on a file system that all machines share."""

from collections.abc import Sequence
from pathlib import Path

from sparsemix.sweep.jobs import WorkerLostError
from sparsemix.sweep.launch.base import LaunchConfig, Launcher, launch_config
from sparsemix.sweep.launch.local import LocalConfig, LocalLauncher
from sparsemix.sweep.launch.ray import RayConfig, RayLauncher
from sparsemix.sweep.launch.slurm import SlurmConfig, SlurmLauncher

__all__ = ["LaunchConfig", "Launcher", "WorkerLostError", "make_launcher"]


def make_launcher(
    name: str, out: Path, settings: Sequence[str] = (), workers: int | None = None, most: int | None = None
) -> Launcher:
    """The launcher called `name` (local, ray, slurm) with settings such as `threads=2`.

    out: the study's folder, in which cluster launchers keep their own files, hidden; workers: runs at a time; most: how
    many there can be work for at a time. Raises ConfigError."""
    config = launch_config(name, settings, workers)
    if isinstance(config, SlurmConfig):
        return SlurmLauncher(config, out / ".slurm")
    if isinstance(config, RayConfig):
        return RayLauncher(config, out / ".ray")
    assert isinstance(config, LocalConfig)
    return LocalLauncher(config, most)
