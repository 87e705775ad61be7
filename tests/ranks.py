"""Two ranks of a process group: forks of one process that has torch and the layers, as importing them takes longest."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

RANKS = 2
multiprocessing.set_forkserver_preload(["sparsemix.api", "sparsemix.layers", "sparsemix.optim"])


def on_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work` returns of each rank; it is a module's function, as it travels by name."""
    mp.start_processes(_on_rank, (work, folder), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _on_rank(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save(work(rank), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
