"""What finished runs need no more is freed, and nothing else."""

import multiprocessing
import os

import pytest

from sparsemix import durable
from sparsemix.config import ConfigError
from sparsemix.run import Run
from sparsemix.sweep.clean import clean
from sparsemix.sweep.phase import phase_of, working
from tiny import run_config, write_corpus


def made(folder, config, finished):
    run = Run(folder, config)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000001" / "optimizer.safetensors").write_bytes(b"x" * 1000)
    if finished:
        run.finish({"bpb": 1.0})
    return folder / "checkpoints"


def killed(path):
    with durable.aside(path) as temporary:
        temporary.write_bytes(b"half")
        os._exit(9)


def test_only_finished_runs_that_did_not_ask_for_theirs_lose_checkpoints(tmp_path):
    config = run_config(write_corpus(tmp_path))
    kept = config.replace(train=config.train.replace(keep_checkpoints=True))
    done = made(tmp_path / "study" / "runs" / "done", config, True)
    others = [made(tmp_path / "open", config, False), made(tmp_path / "kept", kept, True)]
    busy = made(tmp_path / "busy", config, True)
    dead = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "page.html",))
    dead.start()
    dead.join()
    with Run(busy.parent).lock():
        would = list(clean(tmp_path, dry_run=True))
        assert done.exists() and len(durable.leftovers(tmp_path)) == 1
        assert list(clean(tmp_path)) == would
    (half, freed) = would
    assert half.path.name.startswith(".page.html.") and half.bytes == 4
    assert (freed.path, freed.bytes) == (done, 1000)
    assert not done.exists() and not durable.leftovers(tmp_path) and busy.exists() and all(p.exists() for p in others)
    assert [freed.path for freed in clean(tmp_path)] == [busy]
    with pytest.raises(ConfigError, match="no such folder"):
        list(clean(tmp_path / "nowhere"))


def test_a_phase_is_told_while_somebody_works_and_no_longer(tmp_path):
    out = tmp_path / "out"
    assert phase_of(out) is None
    with working(out) as first:
        first("preparing the text")
        assert phase_of(out) == "preparing the text"
        with working(out) as second:
            second("training")
        assert phase_of(out) == "training"
    assert phase_of(out) is None and not list(out.iterdir())
