"""`sparsemix isoflop` as a user meets it: the plan, the runs, a stop, and one-line errors that leave nothing."""

import json
import sys

import pytest

from sparsemix import cli
from sparsemix.report.records import read_runs
from tiny import unchecked_shapes, write_corpus

# Large enough for the runs that this trains; more would only take longer.
SMALL = ["model.d_model=16", "model.blocks.count=2", "model.blocks.each.ffn.d_ff=40", "model.seq_len=16"]
SMALL += ["model.vocab_size=300", "train.batch_tokens=32", "train.evals=1", "train.eval_tokens=100"]
SMALL += ["train.test_tokens=150", "train.threads=1", "data.test_fraction=0.15", "data.validation_fraction=0.15"]
STUDY = ["--kinds", "dense,mod", "--sizes", "8,12,16", "--budgets", "1.5e7", "--seeds", "2"]


class Here:
    """A launcher that does the work in this process, and is interrupted after so many runs."""

    workers = threads = 1

    def __init__(self):
        self.left = 10**9

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, work, jobs, watch):
        for i, job in enumerate(jobs):
            if work.__name__ == "train_job":
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
            yield i, work(*job)


@pytest.fixture
def here(monkeypatch):
    launcher = Here()
    monkeypatch.setattr("sparsemix.sweep.launch.make_launcher", lambda *_, **__: launcher)
    monkeypatch.setattr("sparsemix.sweep.ladder.MIN_STEPS", 4)
    monkeypatch.setattr("sparsemix.sweep.estimate.PROBE_STEPS", 2)
    with unchecked_shapes():
        yield launcher


@pytest.fixture
def isoflop(monkeypatch, capsys, tmp_path):
    """Calls the command: (exit code, standard output, standard error)."""
    text = write_corpus(tmp_path).text[0]

    def call(*args):
        words = ["sparsemix", "isoflop", "--out", str(tmp_path / "out"), "--text", text]
        words += [word for setting in SMALL for word in ("--set", setting)]
        monkeypatch.setattr(sys, "argv", [*words, *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code if isinstance(ended.value.code, int) else 0, said.out, said.err

    return call


def test_the_plan_the_runs_a_stop_and_the_same_command_again(isoflop, here, tmp_path):
    out = tmp_path / "out"
    code, plan, _ = isoflop(*STUDY, "--dry-run")
    assert code == 0 and "6 runs of one seed, 2 of other seeds at the optima: 8 runs" in plan
    assert [path.name for path in out.iterdir()] == ["data"]
    here.left = 7
    code, _, err = isoflop(*STUDY)
    assert code == 130 and err.splitlines()[-1].startswith("sparsemix: interrupted; what was done is saved")
    assert len(read_runs([out])) >= 7
    here.left = 20
    code, _, err = isoflop(*STUDY)
    assert code == 0, err
    assert len(read_runs([out])) >= 8 and here.left >= 0
    trained, here.left = 20 - here.left, 0
    code, tables, _ = isoflop(*STUDY)
    assert code == 0 and f"report: {out / 'report.html'}" in tables and (out / "analysis.json").is_file()
    assert len(list((out / "runs").iterdir())) == trained + 7
    # The routing pictures of the page: of the optimum of the kind that routes, measured once.
    assert err.count("inspect: measuring") == 1
    (inspected,) = (out / "runs").glob("*/inspect/inspect.json")
    (line,) = (line for line in err.splitlines() if line.startswith("read: 1 file, "))
    assert line in (out / "report.html").read_text(encoding="utf-8")
    assert 'id="mod-map-title"' in (out / "report.html").read_text(encoding="utf-8")
    measured = inspected.stat().st_mtime_ns
    isoflop(*STUDY)
    assert inspected.stat().st_mtime_ns == measured
    code, _, err = isoflop(*STUDY[:-1], 3)
    assert code == 2 and "seeds=2 there, 3 asked" in err


def test_a_text_read_often_is_said_in_the_plan(isoflop, here):
    code, plan, _ = isoflop("--kinds", "dense", "--sizes", "8,12,16", "--budgets", "1e9", "--dry-run")
    assert code == 0
    assert "!!" in plan and "no verdict is given there without --allow-repeats" in plan


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--budgets", "soon"], "budgets=soon must be FLOPs, such as 1e12"),
        (["--budgets", "1e12,"], "budgets= must be FLOPs"),
        (["--budgets", "-1e12"], "budgets=-1e12 must be FLOPs"),
        (["--budgets", "1e12,1e12"], "must name each budget once"),
        (["--budgets", "1e4"], "must pay for 50 steps at 5 sizes, as"),
        (["--budgets", "1e12", "--kinds", "dense,pear"], "did you mean 'peer'?"),
        (["--budgets", "1e12", "--kinds", "moe"], "must hold dense"),
        (["--budgets", "1e12", "--size-seeds", "6"], "size_seeds=6 must be at most seeds=5"),
        (["--budgets", "1e12", "--sizes", "8,12,8"], "must name each size once"),
        (["--budgets", "1e12", "--sizes", "8,12"], "must name at least 3"),
        (["--budgets", "1e12", "--sizes", "8,13,16"], "sizes=13 must be an even width"),
        (["--budgets", "1e12", "--sizes", "8,big,16"], "must be all widths or all names"),
        (["--budgets", "1e12", "--sizes", "a,b,c"], "recipe=tiny:a"),
        (["--budgets", "1e12", "--recipe", "tiny-peer"], "with nothing replaced"),
        (["--budgets", "1e12", "--recipe", "tinny"], "did you mean 'tiny'?"),
        (["--budgets", "1e12", "--seeds", "0"], "seeds=0"),
        (["--budgets", "1e12", "--lr", "fast"], "lr=fast must be a positive number, rule, or sweep"),
        (
            ["--budgets", "1e12", "--set", "train.lr=0.1"],
            "overrides=train.lr=0.1 would have no effect: --lr decides train.lr",
        ),
        (["--budgets", "1e12", "--set", "model.d_modl=3"], "did you mean 'd_model'?"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(isoflop, tmp_path, args, says):
    code, out, err = isoflop(*args)
    assert code == 2 and not out
    assert len(err.splitlines()) == 1 and says in err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(isoflop, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.yaml").write_text(json.dumps({"settings": {"kinds": ["dense"]}}))
    code, _, err = isoflop("--budgets", "1e12")
    assert code == 2 and "holds another study" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.yaml"]
