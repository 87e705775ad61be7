"""PEER's Table 1: corpora from local files, both routing rules of expert choice, and what is said of the order."""

from dataclasses import replace
from math import log2

import numpy as np
import pytest
from made_runs import made_run

from made_corpora import write_papers
from sparsemix.config import config_hash
from sparsemix.data import DataConfig
from sparsemix.report.records import read_run
from sparsemix.reproduce import peer_table1
from sparsemix.reproduce.base import SCALES, Lab
from sparsemix.reproduce.entries import entry
from sparsemix.reproduce.peer import methods
from sparsemix.reproduce.peer_corpora import Corpora, Measured
from sparsemix.sweep.arms import backbone, run_config
from sparsemix.train import train
from tiny import prepared, unchecked_shapes
from tiny import run_config as tiny_run

NAMES = ["curation", "lambada", "pile", "wikitext", "c4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run whose experts choose their tokens, and the folder of the corpora, all but one."""
    folder = tmp_path_factory.mktemp("corpora")
    data, shards = prepared(folder)
    config = tiny_run(data, "expert_choice")
    path = folder / "runs" / config_hash(config)
    with unchecked_shapes():
        train(config, path, shards)
    write_papers(folder / "texts")
    (folder / "texts/curation-corpus/articles.jsonl").unlink()
    record = read_run(path, "MoE")
    assert record is not None
    return record, folder / "texts"


def test_a_corpus_that_is_not_at_hand_is_named_and_the_others_are_measured(trained):
    record, texts = trained
    corpora = Corpora(NAMES, texts, 300)
    with unchecked_shapes():
        found = corpora.measure(record, True, lambda _: None)
    assert list(found) == NAMES[1:] and list(corpora.missing) == ["curation"]
    assert "no file curation*/*" in corpora.missing["curation"]
    for one in found.values():
        assert one.perplexity > 1 and one.bpb > 0 and one.lookahead is not None
        # The control: the rules route otherwise, or there would be nothing to tell apart.
        assert one.lookahead != pytest.approx(one.perplexity, rel=1e-9)


def test_what_was_measured_is_kept(trained, monkeypatch):
    record, texts = trained
    said = []
    with unchecked_shapes():
        first = Corpora(NAMES, texts, 300).measure(record, True, said.append)
        monkeypatch.setattr("sparsemix.evaluate.suite.score", lambda *_, **__: pytest.fail("measured again"))
        monkeypatch.setattr("sparsemix.evaluate.sliding.score", lambda *_, **__: pytest.fail("measured again"))
        said.clear()
        assert Corpora(NAMES, texts, 300).measure(record, True, said.append) == first
    assert said == []


def test_without_a_folder_no_model_is_opened(trained, monkeypatch):
    monkeypatch.setattr("sparsemix.trained.load", lambda *_: pytest.fail("a model was opened"))
    corpora = Corpora(NAMES, None, 300)
    assert corpora.measure(trained[0], True, lambda _: None) == {}
    assert list(corpora.missing) == NAMES


class Made:
    """Corpora on which perplexities follow a run's own loss, one of them not at hand."""

    found = dict.fromkeys(NAMES[1:])

    def __init__(self, names, folder, max_tokens):
        self.missing = {"curation": "no file curation*/* below corpora"}
        self.options = type("Options", (), {"max_tokens": max_tokens})

    def measure(self, record, lookahead, say):
        ppl = {name: 2.0 ** (record.bpb + i) for i, name in enumerate(self.found)}
        return {n: Measured(x, log2(x), 0.9 * x if lookahead else None) for n, x in ppl.items()}


def lab(tmp_path, best):
    data, raw, runs = DataConfig(vocab_size=272), backbone("peer-dense:30k", (), 24), {}
    for budget in (1e11, 3e11):
        for arm in methods(SCALES["demo"]):
            for seed in range(3):
                config = run_config(arm, raw, data, budget, seed)
                # What seeds share cancels in pairs, what is a run's own does not.
                nats = (
                    4 + best[arm.name] + 0.1 * seed + 0.002 * np.random.default_rng([seed, *arm.name.encode()]).normal()
                )
                made = made_run(tmp_path, arm.name, config, nats, "seed" if seed else "grid")
                runs.setdefault(arm.name, []).append(replace(made, bpb=nats))
    return Lab(SCALES["demo"], tmp_path, runs, lambda _: None)


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ({"Dense": 0.0, "MoE": -0.1, "PKM": -0.1, "PEER": -0.2}, "reproduced"),
        ({"Dense": 0.0, "MoE": -0.1, "PKM": -0.1, "PEER": 0.2}, "not reproduced"),
        (dict.fromkeys(("Dense", "MoE", "PKM", "PEER"), 0.0), "not resolved at this scale"),
    ],
)
def test_the_table_is_the_papers_with_ours_above_each_row(tmp_path, monkeypatch, best, said):
    monkeypatch.setattr(peer_table1, "Corpora", Made)
    found = peer_table1.outcome(lab(tmp_path, best))
    assert [trend.outcome for trend in found.trends] == [said] * 6
    numbers = entry("peer-table1").numbers["perplexity"]
    rows = found.tables[0].rows
    assert [row[0].split(",")[0] for row in rows[:9]] == ["Dense", "Dense", *["MoE"] * 3, "PKM", "PKM", "PEER", "PEER"]
    printed = [row for row in rows if row[2] == "paper"]
    assert [[float(x) for x in row[3:]] for row in printed] == [
        numbers[arm][i] for i in (0, 1) for arm in ("Dense", "MoE", "PKM", "PEER")
    ]
    ours = [row for row in rows if row[2] == "here"]
    assert all(row[3] == "no data here" for row in ours)
    causal, ahead = ([float(x.split(" ")[0]) for x in row[4:]] for row in ours[1:3])
    assert ahead == pytest.approx([0.9 * x for x in causal], abs=0.01)
    ratios = {tuple(row[:3]): row[3:] for row in found.tables[1].rows}
    wanted = 2 ** (best["PEER"] - best["Dense"])
    assert float(ratios["PEER", "1e+11", "here"][1].split(" ")[0]) == pytest.approx(wanted, abs=0.003)
    assert ratios["PEER", "6e+18", "paper"][4] == f"{20.63 / 23.84:.3f}"
    assert any("Curation: no file" in note for note in found.notes)


def test_without_corpora_nothing_is_resolved_and_the_way_out_is_said(tmp_path):
    found = peer_table1.outcome(lab(tmp_path, dict.fromkeys(("Dense", "MoE", "PKM", "PEER"), 0.0)))
    assert {trend.outcome for trend in found.trends} == {"not resolved at this scale"}
    assert all("--data-dir" in trend.evidence for trend in found.trends)
    assert all(cell == "no data here" for row in found.tables[0].rows if row[2] == "here" for cell in row[3:])
