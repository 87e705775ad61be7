"""A dense run on the small corpus, to convert and to go on from."""

from pathlib import Path
from typing import NamedTuple

from sparsemix import train
from sparsemix.data import DataConfig, Shards
from tiny import prepared, run_config, unchecked_shapes


class DenseRun(NamedTuple):
    """A finished run's folder, and the text it read."""

    folder: Path
    data: DataConfig
    shards: Shards

    @property
    def text(self):
        return [*self.data.text]


def dense_run(place):
    data, shards = prepared(place)
    with unchecked_shapes():
        train.train(run_config(data, steps=30, lr=1e-2), place / "dense", shards)
    return DenseRun(place / "dense", data, shards)
