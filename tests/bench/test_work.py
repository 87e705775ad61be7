"""What a case measures, and when it refuses a ratio."""

import json
import time
from itertools import groupby

import pytest
import torch
from works import X, absent, case, moving, squaring

from sparsemix.bench import work as work_module
from sparsemix.bench.agreement import disagreement
from sparsemix.bench.timing import interleave
from sparsemix.bench.work import OURS, Case, Contender, Number


def number(result):
    (row,) = result["numbers"]
    return row


def test_contenders_that_agree_get_their_ratio():
    result = case(peer=squaring()).measure(quick=True)
    times = {name: row["min_s"] for name, row in result["contenders"].items()}
    assert number(result)["refused"] is None
    assert number(result)["value"] == pytest.approx(times["peer"] / times[OURS])
    assert {row["said"] for row in result["contenders"].values()} == {"ok"}


@pytest.mark.parametrize(
    ("peer", "what"), [(squaring(factor=1.01), "output"), (squaring(gradient=1.01), "gradient of x")]
)
def test_another_output_or_gradient_refuses_the_ratio(peer, what):
    row = number(case(peer=peer).measure(quick=True))
    assert row["value"] is None
    assert row["refused"].startswith(f"peer: {what} differs by")


def test_an_optimizer_that_moves_otherwise_refuses_the_ratio():
    row = number(case(ours=moving(1.0), peer=moving(1.5)).measure(quick=True))
    assert row["value"] is None and "movement of w" in row["refused"]
    assert number(case(ours=moving(1.0), peer=moving(1.001)).measure(quick=True))["value"] is not None


def test_a_nan_disagrees():
    assert disagreement({"output": X}, {"output": X * torch.nan}, 1.0)
    assert disagreement({"output": X * torch.nan}, {"output": X * torch.nan}, 1.0)


def test_a_missing_entry_or_another_shape_disagrees():
    assert disagreement({"output": X, "gradient of x": X}, {"output": X}, 1.0)
    assert disagreement({"output": X}, {"output": X.T}, 1.0)


def test_a_missing_peer_is_a_row_that_says_how_to_get_it():
    result = case(peer=absent).measure(quick=True)
    said = result["contenders"]["peer"]["said"]
    assert said.startswith("not available") and "pip install 'sparsemix[bench]'" in said
    assert number(result)["value"] is None and "pip install" in number(result)["refused"]


def test_the_fastest_of_those_that_are_there_counts():
    def slow():
        made = squaring()()
        return Contender(lambda: [made.run() for _ in range(200)], made.probe)

    row = number(case(slow=slow, gone=absent, quick=squaring()).measure(quick=True))
    assert row["what"] == "times as fast as quick"
    assert row["value"] < 50


def test_one_that_disagrees_is_not_passed_over_for_the_best_of_the_rest():
    row = number(case(peer=squaring(), wrong=squaring(factor=2.0)).measure(quick=True))
    assert row["value"] is None and row["refused"].startswith("wrong:")


def test_a_ratio_of_equals_needs_a_proof():
    def unproved():
        return Contender(lambda: X * X)

    with pytest.raises(AssertionError, match="needs a probe of peer"):
        case(peer=unproved).measure(quick=True)
    assert number(case(peer=unproved, same=False).measure(quick=True))["value"] is not None


def test_a_case_that_does_not_fit_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(work_module, "free_gib", lambda: 1.0)
    result = Case("big", {OURS: absent, "peer": absent}, [Number("fake/big", "", ("peer",))], gib=20).measure(
        quick=True
    )
    assert result["contenders"][OURS]["said"] == "not available: needs 20 GiB of free memory, here are 1"
    assert number(result)["value"] is None


def test_what_a_case_gives_is_json():
    result = case(peer=squaring(), gone=absent).measure(quick=True)
    assert json.loads(json.dumps(result)) == result


def test_the_order_turns_and_the_first_calls_do_not_count():
    seen = []
    times = interleave({name: lambda name=name: seen.append(name) for name in "ab"}, 0.05, most=3)
    assert all(timing.samples == 3 for timing in times.values())
    assert seen[:4] == list("aabb")
    assert [name for name, _ in groupby(seen[4:])] == list("abab")


def test_what_is_slower_than_the_budget_is_called_once_more_only():
    called = []

    def slow():
        called.append(time.sleep(0.02))

    assert interleave({"slow": slow}, budget_s=0.01)["slow"].samples == 1
    assert len(called) == 2
