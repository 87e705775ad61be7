"""What the multi-head reproductions measure on trained models: corpora, bytes, speed; each once."""

import json
import math

import pytest
import torch
from test_reproduce_mh_moe import NO, UNCLEAR, YES, made_run

from made_corpora import small_tokenizer, write_papers
from sparsemix import saved
from sparsemix.config import parse, to_yaml
from sparsemix.data import DataConfig
from sparsemix.evaluate.corpora import read_suite
from sparsemix.evaluate.suite import SuiteOptions, run_suite
from sparsemix.layers.packed import pack_ternary
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce import ternary_decoding, ternary_gap
from sparsemix.reproduce.base import SCALES, Lab
from sparsemix.reproduce.lab import ReproduceConfig, plan
from sparsemix.reproduce.mh_moe_arms import DENSE, H2
from sparsemix.reproduce.mh_moe_corpora import cells, note, paper_table, score
from sparsemix.reproduce.ternary_decoding import FLOAT_FORMS, TERNARY_FORMS, Decoding, decoding, forms_of, sizes, speed
from sparsemix.reproduce.ternary_gap import FLOAT, TERNARY, sign_test
from sparsemix.settings import RunConfig
from sparsemix.sweep.study import Cell
from sparsemix.trained import load
from tiny import run_config


def trained(out, arm, blocks="dense", precision="float", seed=0):
    """A record whose folder holds a model, as if it had been trained."""
    config = run_config(DataConfig(vocab_size=300), blocks, seed=seed)
    if precision == "ternary":
        config = parse(RunConfig, json.loads(config.model_dump_json().replace('"float"', '"ternary"')))
    record = made_run(out, Cell(arm, config), 4.0)
    (record.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    saved.write(config.model.build(seed), record.folder / "model", small_tokenizer())
    return record


def test_corpora_are_scored_by_the_suite_once_and_the_absent_are_named(tmp_path, monkeypatch):
    write_papers(tmp_path / "corpora")
    for path in (tmp_path / "corpora/c4").iterdir():
        path.unlink()
    record = trained(tmp_path, "Dense")
    lab = Lab(SCALES["demo"], tmp_path, {"Dense": [record]}, lambda _: None, corpora=tmp_path / "corpora")
    found = score(lab)
    model = load(record.folder)
    own = read_suite("papers", ["redpajama", "wikitext"])
    wanted = run_suite(
        model.model, model.tokenizer, own, tmp_path / "corpora", SuiteOptions(), tmp_path / "x.json",
        lambda *_: None, lambda _: None,
    )  # fmt: skip
    for name in own:
        assert found["Dense"][name] == [wanted["corpora"][name]["rows"][0]["perplexity"]["value"]]
    assert cells(found, "Dense")[2] == "no data here"
    monkeypatch.setattr("sparsemix.evaluate.suite.measure", lambda *_: pytest.fail("scored again"))
    assert score(lab) == found
    table = paper_table("", {"Dense": {"end": "Dense"}}, found, {"half": {"Dense": [1, 2, 3]}, "end": {}})
    assert table.rows[0][1:4] == ["–"] * 3 and table.rows[1][1:4] == ["1.00", "2.00", "3.00"]
    assert table.rows[0][4] == f"{found['Dense']['redpajama'][0]:.2f}"


def test_without_a_folder_nothing_is_scored_and_that_is_said(tmp_path):
    lab = Lab(SCALES["demo"], tmp_path, {"Dense": [trained(tmp_path, "Dense")]}, print)
    assert score(lab) == {} and "--data-dir" in note(lab, {})


def test_packed_forms_hold_two_bits_a_weight_in_memory_and_on_disk(tmp_path):
    record = trained(tmp_path, "t", "mh_moe", "ternary")
    model = load(record.folder).model
    ternary = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name and "router" not in name
    ) - sum(p.numel() for name, p in model.named_parameters() if name.endswith("experts.sub_norm"))
    scales = sum(m.scale.nbytes for m in pack_ternary(load(record.folder).model).modules() if hasattr(m, "scale"))
    rest = sum(p.numel() for p in model.parameters()) - ternary
    forms = forms_of(model)
    assert list(forms) == list(TERNARY_FORMS)
    for width, (form, packed) in zip((4, 2), forms.items(), strict=True):
        found = sizes(packed, tmp_path / form)
        assert found["ternary_bytes"] == ternary / 4 + scales
        assert found["memory_bytes"] == ternary / 4 + scales + width * rest
        assert 0 <= found["disk_bytes"] - found["memory_bytes"] < 8192
    real = forms_of(load(trained(tmp_path, "f", "mh_moe").folder).model)
    assert list(real) == list(FLOAT_FORMS)
    wholes = [sizes(real[form], tmp_path / form)["memory_bytes"] for form in FLOAT_FORMS]
    assert wholes[0] == 2 * wholes[1] == 4 * sum(p.numel() for p in real["fp32"].parameters())


def test_models_take_turns_and_the_warm_up_counts_for_nothing(monkeypatch):
    order = []
    monkeypatch.setattr(ternary_decoding, "_write", lambda model, n: order.append(model))
    found = speed({"a": "A", "b": "B"}, rounds=3, new_tokens=5)
    assert order == ["A", "B", "A", "B", "B", "A", "A", "B"]
    assert {name: len(of) for name, of in found.items()} == {"a": 3, "b": 3}


def test_bytes_and_speed_are_measured_once_for_the_same_runs(tmp_path, monkeypatch):
    records = {"float": trained(tmp_path, "float"), "ternary": trained(tmp_path, "ternary", precision="ternary")}
    said = []
    found = decoding(tmp_path / "kept.json", records, said.append, rounds=2, new_tokens=2)
    assert set(found.forms["float"]) == set(FLOAT_FORMS) and set(found.forms["ternary"]) == set(TERNARY_FORMS)
    assert all(min(form["tokens_per_s"]) > 0 for of in found.forms.values() for form in of.values())
    monkeypatch.setattr(ternary_decoding, "speed", lambda *_: pytest.fail("measured again"))
    assert decoding(tmp_path / "kept.json", records, said.append) == found and len(said) == 1
    packed = load(records["ternary"].folder / "forms" / "two-bits-rest-fp32")
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(packed.model(tokens).logits, load(records["ternary"].folder).model(tokens).logits)


def lab_of_gap(out, loss, times):
    """Made runs of ternary-gap, and made speeds: 1.58 bit `times` as fast."""
    runs = {}
    for cell in plan("ternary-gap", ReproduceConfig(seeds=4)).cells:
        runs.setdefault(cell.arm, []).append(made_run(out, cell, 4 + loss(cell.arm)))
    sizes_of = {"disk_bytes": 1000, "memory_bytes": 800, "ternary_bytes": 0}
    forms = {
        arm: {
            form: {**sizes_of, "tokens_per_s": [(times if TERNARY in arm else 1) * (100.0 + i) for i in range(9)]}
            for form in (TERNARY_FORMS if TERNARY in arm else FLOAT_FORMS)
        }
        for arm in runs
    }
    kept = Decoding({arm: of[0].folder.name for arm, of in runs.items()}, forms, "made")
    (out / "ternary-gap").mkdir(exist_ok=True)
    (out / "ternary-gap" / "decoding.json").write_text(json.dumps(kept._asdict()))
    # A rate that was only tried must not count.
    runs[DENSE + FLOAT].append(runs[DENSE + FLOAT][0].__class__(**{**runs[DENSE + FLOAT][0].__dict__, "role": "rate"}))
    return Lab(SCALES["demo"], out, runs, print)


GAPS = {DENSE + TERNARY: 0.1, H2 + TERNARY: 0.05}


@pytest.mark.parametrize(("sign", "times", "said"), [(1, 2.0, YES), (-1, 0.5, NO), (0, 1.0, UNCLEAR)])
def test_the_gap_of_ternary_weights_is_found_reversed_or_left_open(sign, times, said, tmp_path):
    lab = lab_of_gap(tmp_path, lambda arm: sign * GAPS.get(arm, 0), times)
    found = ternary_gap.outcome(lab)
    assert [trend.outcome for trend in found.trends] == [said] * 5
    gap = float(found.tables[0].rows[0][1].replace("−", "-"))
    assert gap == pytest.approx(sign * 0.1, abs=2e-3)
    assert found.tables[1].rows[2][3] == f"{math.log(12.87 / 12.33):+.4f}"
    assert found.tables[4].rows[0][2].count(":") == 1 and found.tables[4].rows[1][2] == "–"
    assert all(isinstance(table, TextTable) for table in found.tables)


def test_both_precisions_have_the_same_norms_and_the_same_cost():
    cells = {cell.arm: cell.config for cell in plan("ternary-gap", ReproduceConfig()).cells}
    for kind in (DENSE, H2):
        real, ternary = (cells[kind + name].model.cost() for name in (FLOAT, TERNARY))
        assert (real.flops, real.params) == (ternary.flops, ternary.params)


def test_a_sign_test_counts_rounds():
    assert sign_test("", [2.0] * 9 + [0.5]).p_value == pytest.approx(2 * 11 / 2**10)
    assert sign_test("", [1.0, 1.0]).p_value == 1.0
