import subprocess
import sys

import pytest
import torch

from sparsemix import machine
from sparsemix.config import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A machine whose processor says this of itself; None: nothing."""

    def named(text):
        (tmp_path / "cpuinfo").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
        monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
        machine.multiplies_bf16.cache_clear()

    yield named
    machine.multiplies_bf16.cache_clear()


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 vnni\n", torch.bfloat16),
        ("flags : fpu amx_bf16 amx_tile\n", torch.bfloat16),
        ("Features : fp asimd i8mm bf16\n", torch.bfloat16),
        # A word that holds the name, another line that has it, and a processor that says nothing.
        ("flags : fpu avx2 not_avx512_bf16_at_all\nbugs : bf16\n", torch.float32),
        ("", torch.float32),
        (None, torch.float32),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it_whatever_the_load(processor, monkeypatch, said, dtype):
    processor(said)
    # A busy machine has measured either for one and the same processor.
    for rates in ({"float32": 1e11, "bfloat16": 9e11}, {"float32": 1e11, "bfloat16": 1e10}):
        monkeypatch.setattr(machine, "product_rates", lambda rates=rates: rates)
        assert machine.pick_dtype("auto", CPU) == dtype
    assert machine.pick_dtype("float32", CPU) == torch.float32
    assert machine.pick_dtype("auto", GPU) == machine.pick_dtype("bfloat16", CPU) == torch.bfloat16


def test_both_number_types_are_measured_once_a_process():
    machine.product_rates.cache_clear()
    first = machine.product_rates()
    assert set(first) == {"float32", "bfloat16"} and min(first.values()) > 1e6
    assert machine.product_rates() is first


def test_threads_are_measured_and_put_back():
    before = torch.get_num_threads()
    assert set(machine.thread_rates([1, 2])) == {1, 2}
    assert torch.get_num_threads() == before
    assert max(machine.thread_rates()) == machine.usable_processors()


@pytest.fixture
def sixteen(monkeypatch):
    """A machine of 16 processors whose rates are written down; the threads that a run takes."""
    set_to = []
    monkeypatch.setattr(machine, "usable_processors", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(machine, "thread_rates", lambda counts: {n: min(n, 7.8) for n in counts})
    return set_to


def test_auto_takes_the_fewest_threads_that_are_as_fast(sixteen, monkeypatch):
    assert machine.use_threads("auto") == 8 and sixteen == [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # a worker's share, or OMP_NUM_THREADS
    assert machine.use_threads("auto") == 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert machine.use_threads("auto") == 6


def test_without_a_wish_torchs_threads_stay_and_more_than_there_are_processors_are_refused(sixteen):
    assert machine.use_threads(None) == 16 and machine.use_threads(3) == 3
    with pytest.raises(ConfigError, match=r"train\.threads=17 exceeds the 16 processors"):
        machine.use_threads(17)


@pytest.mark.parametrize("setting", [None, "auto", 2])
def test_a_run_goes_on_with_the_threads_that_it_began_with(sixteen, setting):
    assert machine.use_threads(setting, kept=2) == 2
    assert machine.use_threads(setting, kept=64) == 16


def test_threads_are_put_back_after_a_run():
    before = torch.get_num_threads()
    with machine.own_threads():
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before


def test_auto_compiles_where_training_takes_a_quarter_of_an_hour(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not machine.pick_compile("auto", 8e13, CPU) and machine.pick_compile("auto", 1e14, CPU)
    assert not machine.pick_compile("auto", 8e16, GPU) and machine.pick_compile("auto", 1e17, GPU)
    assert machine.pick_compile(True, 1.0, CPU) and not machine.pick_compile(False, 1e20, CPU)


def test_without_a_compiler_auto_does_not_compile_and_a_wish_is_refused(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert not machine.pick_compile("auto", 1e20, CPU)
    with pytest.raises(ConfigError, match=r"train\.compile=True needs a C\+\+ compiler"):
        machine.pick_compile(True, 1e20, CPU)


def test_the_allocator_is_tuned_with_glibc_and_refused_elsewhere(monkeypatch):
    monkeypatch.setattr(machine, "allocator_is_tunable", lambda: False)
    with pytest.raises(ConfigError, match="glibc has"):
        machine.tune_cpu_allocator()


FAULTS = """
import resource, sys, torch, sparsemix
torch.set_num_threads(1)
if sys.argv[1] == "tuned":
    sparsemix.tune_cpu_allocator()
for i in range(14):
    torch.ones(2**23)  # 32 MiB
    if i == 9:  # freed blocks come back in the same places after a few rounds
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not machine.allocator_is_tunable(), reason="needs glibc")
def test_a_tuned_allocator_faults_in_no_page_twice():
    faults = {}
    for name in ("plain", "tuned"):
        command = [sys.executable, "-c", FAULTS, name]
        faults[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["tuned"] < 0.2 * faults["plain"]
