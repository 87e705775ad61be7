"""A run that was killed or interrupted, and resumed, ends with the same bits as one that was not."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsemix import checkpoint, durable, train
from sparsemix.config import to_yaml
from sparsemix.interop.card import about_training
from sparsemix.ops import impl
from sparsemix.provenance import versions
from sparsemix.report.isoflop import analyse
from sparsemix.report.records import read_runs
from sparsemix.report.study_page import write_study
from sparsemix.reproduce.write import made_by
from sparsemix.run import Run
from sparsemix.signals import Terminated, stopped_code
from tiny import prepared, run_config

STEPS = 8
# Times, and what the system says of memory: nothing else may differ between two runs.
CLOCK = ("wall_s", "tokens_per_s", "peak_memory_bytes")
MOMENTS = ("train_step", "optimizer_step", "log", "weights_file", "rename")
pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed process is forked: POSIX only"),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """MoD with a predictor around PEER with batch statistics, after a MoE; two micro-batches a step."""
    folder = tmp_path_factory.mktemp("unbroken")
    data, shards = prepared(folder)
    kept = {"checkpoint_s": 0, "keep_checkpoints": True}
    config = run_config(data, "nested", STEPS, accumulation=2, evals=2, **kept)
    train.train(config, folder / "run", shards)
    return config, shards, folder / "run"


def tensors(run, file):
    newest = max((run / "checkpoints").iterdir())
    return load_file(run / "model" / "model.safetensors" if file == "model" else newest / f"{file}.safetensors")


def without_clock(line):
    return {name: value for name, value in line.items() if name not in CLOCK}


def assert_same_end(run, reference, steps=STEPS):
    for file in ("model", "optimizer"):
        there, expected = tensors(run, file), tensors(reference, file)
        assert there.keys() == expected.keys()
        for name in expected:
            assert torch.equal(there[name], expected[name]), name
    lines, logged = ([without_clock(line) for line in Run(folder).metrics()] for folder in (run, reference))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines == logged
    assert without_clock(Run(run).result) == without_clock(Run(reference).result)
    nats = [np.load(folder / "documents.npz")["nats"] for folder in (run, reference)]
    np.testing.assert_array_equal(*nats)


def steps_of(names):
    return [int(name.removeprefix("step-")) for name in names.split(",")]


def test_a_run_killed_at_random_points_and_inside_a_checkpoint_ends_with_the_same_bits(unbroken, tmp_path):
    config, shards, reference = unbroken
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    rng = random.Random(0)
    kills = [f"{moment}:{rng.randrange(1, 4)}" for moment in rng.sample(MOMENTS, 5)]
    kills[2:2] = ["optimizer_file:2", "rewind:1"]
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(shards.folder), str(tmp_path / "run"), str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, *kills, "evaluate:1"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    *deaths, last = [line.split(" ") for line in done.stdout.splitlines()]
    assert [death[0] for death in deaths] == [*kills, "evaluate:1"]
    assert {death[1] for death in deaths} == {str(signal.SIGKILL.value)}, done.stderr
    # The one that died while it wrote left half a checkpoint, and the next to save (see `last`) removed it.
    assert int(deaths[2][3]) > 0
    reached = [max(steps_of(death[2])) for death in deaths if death[2]]
    assert reached == sorted(reached) and 0 < reached[0] < STEPS
    assert last == ["None", "0", f"step-{STEPS - 1:08d},step-{STEPS:08d}", "0"], done.stderr
    assert_same_end(tmp_path / "run", reference)


@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupt_from_the_progress_callback_saves_and_resumes_to_the_same_bits(unbroken, tmp_path, step):
    config, shards, reference = unbroken
    config = config.replace(train=config.train.replace(checkpoint_s=1e6))

    def interrupt(line):
        if line["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path, shards, interrupt)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert Run(tmp_path).result is None
    train.train(config, tmp_path, shards)
    assert_same_end(tmp_path, reference)


def test_random_routing_draws_from_seed_and_step_alone(unbroken, tmp_path):
    data, shards = unbroken[0].data, unbroken[1]
    config = run_config(data, "random", STEPS, checkpoint_s=1e6, keep_checkpoints=True)

    def interrupt(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    torch.manual_seed(1)
    train.train(config, tmp_path / "whole", shards)
    torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "twice", shards, interrupt)
    torch.manual_seed(3)
    train.train(config, tmp_path / "twice", shards)
    assert_same_end(tmp_path / "twice", tmp_path / "whole")


def test_a_run_says_the_same_again_and_when_it_was_resumed_at_its_end(unbroken, tmp_path):
    data, shards = unbroken[0].data, unbroken[1]
    config = run_config(data, "mode", STEPS)
    config = config.replace(train=config.train.replace(checkpoint_s=1e6, keep_checkpoints=True))

    results = [train.train(config, tmp_path / name, shards).result for name in ("once", "again")]
    steps = results[0]["steps"]

    def interrupt(line):
        if line["step"] == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "resumed", shards, interrupt)
    # What this process has called in between is no part of the run.
    impl.Kernels("an_op").pick("auto", torch.ones(1))
    train.train(config, tmp_path / "resumed", shards)
    for name in ("again", "resumed"):
        assert_same_end(tmp_path / name, tmp_path / "once", steps)
    assert results[0]["kernels"] and "an_op" not in Run(tmp_path / "resumed").result["kernels"]


def test_result_manifest_page_and_card_name_the_commits_that_made_a_run(unbroken, tmp_path, monkeypatch):
    config, shards, reference = unbroken
    first = Run(reference).result["versions"]
    assert first == shards.manifest["versions"] == versions()
    # Its end is made by a process of other code.
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr("sparsemix.provenance.commit", lambda: "c0ffee (changed)")
    train.train(config, tmp_path / "run", shards)
    result = Run(tmp_path / "run").result
    both = "; ".join([first["commit"], "c0ffee (changed)"] if "commit" in first else ["c0ffee (changed)"])
    assert result["versions"] == first | {"commit": both}
    assert f"commit {both}" in about_training(config, result)
    records = read_runs([tmp_path / "run"])
    told = made_by(records)
    assert told["versions"]["commit"] == both and told["kernels"] == result["kernels"]
    text = write_study(analyse(records, resamples=10), tmp_path, records).read_text(encoding="utf-8")
    assert both in text and all(f"{name} {impl}" in text for name, impl in result["kernels"].items())


@pytest.fixture
def answers_ctrl_c():
    """Ctrl-C and SIGTERM as in a terminal: a process started in the background by a shell ignores the one."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    # Libraries that other tests start (Ray) leave handlers of their own.
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("answers_ctrl_c")
@pytest.mark.parametrize(
    ("moment", "number", "stop"),
    [("update", signal.SIGINT, KeyboardInterrupt), ("AdamW.step", signal.SIGTERM, Terminated)],
)
def test_ctrl_c_and_sigterm_in_a_step_wait_for_its_end(unbroken, tmp_path, monkeypatch, moment, number, stop):
    config, shards, reference = unbroken
    config = config.replace(train=config.train.replace(checkpoint_s=1e6))
    owner, name = (torch.optim.AdamW, "step") if moment == "AdamW.step" else (train, moment)
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        made = real(*args, **kwargs)
        if len(calls) == 2:
            signal.raise_signal(number)
        return made

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(stop) as stopped:
        train.train(config, tmp_path, shards)
    assert stopped_code(stopped.value) == 128 + number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train.train(config, tmp_path, shards)
    assert_same_end(tmp_path, reference)


def test_a_half_written_checkpoint_and_a_torn_line_are_dropped(unbroken, tmp_path):
    config, shards, reference = unbroken

    def interrupt(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path, shards, interrupt)
    half = tmp_path / "checkpoints" / ".step-00000007.123"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"loss": 5.1, "step": 4}\n{"loss": 4.9, "st')
    train.train(config, tmp_path, shards)
    assert not half.exists()
    assert_same_end(tmp_path, reference)


def test_a_run_that_resumes_from_too_early_a_state_would_be_noticed(unbroken, tmp_path):
    """The control: one step taken twice gives other bits."""
    config, shards, reference = unbroken

    def interrupt(line):
        if line["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path, shards, interrupt)
    there = max((tmp_path / "checkpoints").iterdir())
    state = (there / "state.json").read_text(encoding="utf-8")
    (there / "state.json").write_text(state.replace('"step": 4', '"step": 3'), encoding="utf-8")
    durable.seal(there)
    train.train(config, tmp_path, shards)
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path, reference)


def test_a_finished_run_returns_at_once(unbroken, monkeypatch):
    config, shards, reference = unbroken
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("a finished run was loaded"))
    assert train.train(config, reference, shards).result == Run(reference).result
