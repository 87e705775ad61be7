"""One damaged run never stops `status` or `report` for the rest, and is one line itself."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import sparsemix
from sparsemix.cli.app import run
from sparsemix.durable import SEAL
from sparsemix.errors import DamagedError
from sparsemix.inputs import checked_json
from sparsemix.run import Run
from sparsemix.sweep.status import RunStatus, table
from sparsemix.terminal import show
from tiny import prepared, result_of, run_config, unchecked_shapes


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    with unchecked_shapes():
        data, shards = prepared(place)
        for seed in (0, 1):
            result_of(run_config(data, steps=2, seed=seed), place / "runs" / f"dense-{seed}", shards)
    return place / "runs"


@pytest.fixture
def runs(whole, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # The figures are drawn as SVG; making pictures of them takes most of a report's time.
    monkeypatch.setattr("sparsemix.report.pictures.png", lambda shape: b"")
    shutil.copytree(whole, tmp_path / "runs")
    # As of an earlier version: what checksums cannot tell has to be seen in the values.
    (tmp_path / "runs" / "dense-1" / SEAL).unlink()
    return tmp_path / "runs"


def call(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sparsemix", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        run()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err  # type: ignore[return-value]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def other(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def no_model(path: Path) -> None:
    path.write_text("train: {budget_flops: 1.0, lr: 0.1}\nseed: 0\nmodel: [1]\n")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("config.yaml", cut),
        ("config.yaml", no_model),
        ("config.yaml", lambda path: path.write_text("&a [*a]")),
        ("result.json", cut),
        ("result.json", lambda path: other(path, bpb="x")),
        ("result.json", lambda path: (path.unlink(), path.mkdir())),
    ],
)
def test_status_and_report_go_on_beside_a_damaged_run(runs, monkeypatch, capsys, name, spoil):
    spoil(runs / "dense-1" / name)
    code, out, err = call(monkeypatch, capsys, "status", runs)
    assert (code, err) == (0, "")
    assert "dense-0" in out and "1 of 2 runs done, 1 damaged" in out.replace("\n", " ")
    code, out, err = call(monkeypatch, capsys, "report", runs)
    assert code == 0, err
    assert (runs / "report.html").is_file()
    assert err.count("left out: ") == 1 and "dense-1" in err
    assert call(monkeypatch, capsys, "status", runs / "dense-1")[0] == 0
    code, _, err = call(monkeypatch, capsys, "report", runs / "dense-1")
    assert code == 2 and err.splitlines()[-1].startswith("sparsemix: ")


@pytest.mark.parametrize("held", [b"PK\x03\x04", b"", b"\x93NUMPY"])
def test_documents_that_are_damaged_are_found_before_they_are_used(runs, monkeypatch, capsys, held):
    (runs / "dense-1" / "documents.npz").write_bytes(held)
    code, _, err = call(monkeypatch, capsys, "report", runs)
    assert code == 0 and "left out: " in err and "dense-1" in err
    (runs / "dense-1" / "documents.npz").unlink()
    assert "left out" not in call(monkeypatch, capsys, "report", runs)[2], "runs of the first version hold none"


PLANS = ["cells: 3", "cells: [3]", "cells: [{run: 3}]", "cells: [{run: a, width: x}]", "x", "{"]


@pytest.mark.parametrize("text", PLANS)
@pytest.mark.parametrize("command", ["status", "report"])
def test_a_damaged_plan_is_one_line(runs, monkeypatch, capsys, text, command):
    (runs / "plan.yaml").write_text(text)
    code, out, err = call(monkeypatch, capsys, command, runs)
    assert (code, out, err.count("\n")) == (2, "", 1) and "plan.yaml" in err


def test_a_damaged_comparison_is_one_line(runs, monkeypatch, capsys):
    for held in ('{"rows": 3}', '{"rows": [{"runs": [{"folder": 3}]}]}', "[", "[1]"):
        (runs / "result.json").write_text(held)
        code, _, err = call(monkeypatch, capsys, "report", runs)
        assert (code, err.count("\n")) == (2, 1) and "result.json" in err, held


def test_a_name_is_no_markup(capsys):
    names = ["[/x]", "[bold]", "a[red]b", ":smile:"]
    show(table([RunStatus(Path("run"), name, 1.0, 8, 0, said=name) for name in names]))
    out = capsys.readouterr().out
    assert all(out.count(name) == 2 for name in names)


def test_a_comparisons_damaged_result_costs_no_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "plan.yaml").write_text("x: 1\n")
    (tmp_path / "result.json").write_text("")
    monkeypatch.setattr("sys.argv", ["sparsemix", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    assert "the same `sparsemix compare` writes it anew" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("result.json", "bpb"), ("config.yaml", "seed")])
def test_a_changed_number_of_a_finished_run_is_damage_to_whoever_reads_it(runs, monkeypatch, capsys, name, said):
    path = runs / "dense-0" / name
    text = path.read_text()
    # As long as before, and a number like any other.
    at = text.index(said) + text[text.index(said) :].index("0")
    path.write_text(f"{text[:at]}1{text[at + 1 :]}")
    code, out, err = call(monkeypatch, capsys, "status", runs)
    assert (code, err) == (0, "") and "1 of 2 runs done, 1 damaged" in out.replace("\n", " ")
    with pytest.raises(DamagedError, match=f"{name} is not what was written"):
        _ = Run(runs / "dense-0").settings if name == "config.yaml" else Run(runs / "dense-0").result
    code, _, err = call(monkeypatch, capsys, "report", runs)
    assert code == 0 and err.count("left out: ") == 1 and name in err


def spoilt(path: Path) -> None:
    """The first digit is another one."""
    at = re.search(r": [^:]*?\d", path.read_text().partition("\n")[2])
    text = path.read_text()
    place = text.index("\n") + at.end()  # type: ignore[union-attr]
    path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")


def test_what_a_report_can_do_without_is_named_and_left_out(whole, runs, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "report", runs)[0] == 0
    (runs / "dense-0" / "inspect").mkdir()
    (runs / "dense-0" / "inspect" / "inspect.json").write_text(checked_json({"runs": [{"tokens": 1}]}))
    shutil.copytree(whole.parent / "shards", runs.parent / "data")
    files = {
        runs / "analysis.json": "it is not what was written",
        runs / "dense-0" / "inspect" / "inspect.json": "it is not what was written",
        runs.parent / "data" / "manifest.json": "manifest.json is not what was written",
    }
    for path, why in files.items():
        before = path.read_bytes()
        spoilt(path)
        code, out, err = call(monkeypatch, capsys, "report", runs)
        said = " ".join((out + err).split())
        assert code == 0 and said.count(f"is damaged ({why})") == 1 and path.name in said, said
        path.write_bytes(before)


def test_every_json_that_one_command_writes_and_another_reads_has_a_checksum():
    # Of these the folder holds the checksums (`durable.seal`), or they are what a person reads.
    sealed = {"durable.py", "saved.py", "run.py", "checkpoint.py", "write_shards.py", "conversion.py"}
    # Of these a person wrote the file, or the reader looks at the folder's checksums itself.
    checked = {"inputs.py", "saved.py", "shards.py", "folder.py"}
    wrote, read = set(), set()
    package = Path(sparsemix.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if package / "bench" not in path.parents:
            wrote |= {path.name} if re.search(r"(write_atomic|write_text|\.write)\(.*json\.dumps", text) else set()
            read |= {path.name} if "load_json(" in text else set()
    assert wrote == sealed and read == checked
