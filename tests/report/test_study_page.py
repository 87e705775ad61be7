"""The page of an isoFLOP study, from made-up runs whose laws are known."""

import csv
import json
import re
from dataclasses import replace
from itertools import pairwise
from urllib.parse import quote

import pytest
from made_records import ARMS, made_record, made_study
from test_inspect_page import OVERLAPS, inspected  # noqa: F401  (a fixture)
from test_page import Page, browser, screen  # noqa: F401  (a fixture)

from sparsemix.report import study_layers, study_losses, study_plots, study_tables
from sparsemix.report.isoflop import analyse
from sparsemix.report.study_details import details, differences, layers
from sparsemix.report.study_page import Page as StudyPage
from sparsemix.report.study_page import write_study

SECTIONS = [
    "summary", "curves", "optima", "relative", "compute", "cost", "routing", "settings", "limits", "data", "reproduce",
    "runs",
]  # fmt: skip


@pytest.fixture(scope="module")
def records():
    return made_study(num_sizes=5, num_seeds=3)


@pytest.fixture(scope="module")
def analysis(records):
    return analyse(records, resamples=200, command="sparsemix isoflop --kinds dense,moe,peer,mod")


def page_of(analysis, records, out):
    text = StudyPage(analysis, details(records, out)).html()
    page = Page(text)
    assert not page.wrong and not page.open
    assert len(set(page.ids)) == len(page.ids)
    return text, page


def test_the_page_is_whole_fetches_nothing_and_runs_nothing(analysis, records, tmp_path):
    text, page = page_of(analysis, [replace(r, folder=tmp_path / "runs" / r.folder.name) for r in records], tmp_path)
    assert list(page.sections) == SECTIONS
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    outside = [link for link in page.links if not link.startswith(("#", "figures/", "./runs/"))]
    assert outside == ["data:,"] and f"./runs/{quote(records[0].folder.name)}/" in page.links
    assert not re.search(r"https?:|@import|url\(|<script|<iframe|javascript:", text)
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b", " ".join(page.sections.values()))


def test_who_cannot_see_the_page_can_read_it(analysis, records, tmp_path):
    text, _ = page_of(analysis, records, tmp_path)
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    figures = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(figures) > 20
    for figure in figures:
        assert re.search(r"<title id=\S+>[^<]+</title><desc id=\S+>[^<]{20,}</desc>", figure)
        assert "<figcaption>" in figure
    tables = re.findall(r"<table>(.*?)</table>", text, re.DOTALL)
    assert len(tables) > 8 and all("<caption>" in t and 'scope="col"' in t and 'scope="row"' in t for t in tables)
    assert 'class="skip" href="#summary"' in text and "optimum 3." in text


def test_the_optimum_drawn_is_the_one_that_was_fitted(analysis):
    for size in study_plots.SIZES:
        charts = {drawn.shape.id: drawn.shape for drawn in study_plots.isoflop(analysis, size)}
        assert len(charts) == len(ARMS)
        for curve in analysis["curves"]:
            chart = charts[f"isoflop-{curve['arm']}-{size.key.replace('_', '-')}"]
            line = chart.lines[analysis["budgets"].index(curve["budget"])]
            assert sorted(y for _, y in line.points) == sorted(n for p in curve["points"] for n in p["seeds"])
            star, best, law = line.star, curve["optimum"], ARMS[curve["arm"]]
            share = {"params": 1, "active_params": 1 / law.sparsity, "forward_flops": 2 / law.sparsity}[size.key]
            assert star.y == best["nats"] and star.x == pytest.approx(best["params"] * share, rel=1e-3)
            assert star.x_ci == pytest.approx([end * share for end in best["params_ci"]], rel=0.02)
            lowest = min(line.path, key=lambda point: point[1])
            assert lowest[0] == pytest.approx(star.x, rel=0.15) and lowest[1] == pytest.approx(star.y, abs=0.01)


def test_no_fit_is_drawn_over_a_size_that_does_not_grow_with_the_parameters(analysis):
    other = json.loads(json.dumps(analysis))
    points = next(curve["points"] for curve in other["curves"] if curve["arm"] == "peer")
    points[0]["active_params"], points[1]["active_params"] = points[1]["active_params"], points[0]["active_params"]
    peer = {size.key: study_plots.isoflop(other, size)[2] for size in study_plots.SIZES}
    assert peer["params"].shape.lines[0].path and "is no curve here" not in peer["params"].caption
    first, second = peer["active_params"].shape.lines
    assert not first.path and first.star is None and second.path and "is no curve here" in peer["active_params"].caption


def test_the_overlay_is_relative_to_the_baselines_optimum(analysis):
    drawn = study_plots.overlays(analysis)
    assert len(drawn) == 2
    chart = drawn[0].shape
    dense, moe = chart.lines[:2]
    assert (dense.star.x, dense.star.y) == (1.0, 1.0)
    best = next(c["optimum"] for c in analysis["curves"] if c["arm"] == "dense")
    point = next(c for c in analysis["curves"] if c["arm"] == "moe")["points"][0]
    assert moe.points[0] == pytest.approx(
        (point["forward_flops"] / best["forward_flops"], point["nats"] / best["nats"])
    )


def test_the_envelope_falls_and_takes_the_best_run(analysis):
    chart = study_losses.envelope(analysis).shape
    for line in chart.lines:
        losses = [y for _, y in line.points]
        assert losses == sorted(losses, reverse=True)
        mine = [
            (c, b) for r in analysis["runs"] if r["arm"] == line.name and r["role"] != "rate" for c, _, b in r["curve"]
        ]
        assert all(min(b for c, b in mine if c <= x) == pytest.approx(y) for x, y in line.points)


def test_tables_hold_the_numbers_of_the_analysis(analysis):
    moe = next(q for q in analysis["quantities"] if q["arm"] == "moe")
    (row, *_) = study_tables.gaps(analysis).rows
    low, high = (f"{end:+.4f}".replace("-", "−") for end in moe["gap_nats_ci"])
    assert row[2] == f"{moe['gap_nats']:+.4f} [{low},\u00a0{high}]".replace("-", "−") and row[6] == moe["verdict"]
    text = study_tables.to_markdown(analysis)
    assert row[2] in text and analysis["does_not_show"][0] in text and "`sparsemix isoflop" in text
    assert all(warning in text for warning in analysis["warnings"])
    assert len(study_tables.runs(analysis).rows) == len(analysis["runs"])


def test_a_study_of_one_budget_and_one_size_says_what_it_cannot_tell(tmp_path):
    one = [
        made_record(arm, 1e13, 3e5, seed, 3.5 + 0.01 * seed, ARMS[arm]) for arm in ("dense", "mod") for seed in (0, 1)
    ]
    _, page = page_of(analyse(one, resamples=50), one, tmp_path)
    assert "no arm's sizes bracket an optimum" in page.sections["summary"]
    assert "no optimum" in page.sections["optima"] and "a quadratic" in page.sections["curves"]
    assert "relative" not in page.sections
    assert "all runs have the same: d_ff of dense" in page.sections["cost"]


def test_what_one_budget_cannot_tell_is_said(records):
    one = analyse([record for record in records if record.budget == 1e13], resamples=50)
    rows = {row[0]: row for row in study_tables.equal_loss(one).rows}
    assert rows["moe"][3:5] == ["one budget", "one budget"] and rows["moe"][2][0] == "0"
    assert "one budget: no power law" in study_plots.optimum_against_budget(one).caption.lower()


def test_settings_that_differ_are_told_and_no_others(records):
    told = dict(differences(records))
    assert told["model.blocks.1.ffn.kind"] == {"dense": "dense", "moe": "moe", "peer": "peer", "mod": "dense"}
    assert told["model.blocks.1.mod"]["mod"] == "yes" and told["model.blocks.1.mod"]["dense"] == "–"
    assert told["model.blocks.1.ffn.num_experts"]["moe"] == "16"
    assert not [name for name in told if name.startswith(("seed", "train", "data"))]


def test_costs_are_drawn_against_the_sizes_in_which_runs_differ(analysis, records):
    told = [layers(record) for record in records]
    moe = next(record for record in records if record.arm == "moe")
    assert layers(moe)["d_ff"] == 2 * moe.settings["model"]["d_model"] and layers(moe)["num_experts"] == 16
    for of, run in zip(told, analysis["runs"], strict=True):
        of["activation_bytes"] = 40.0 * run["width"]
        of["num_experts"] = of["num_experts"] and of["num_experts"] * run["width"] if run["arm"] == "peer" else 16
    charts = {drawn.shape.id: drawn.shape for drawn in study_layers.costs(analysis, told)}
    assert list(charts) == [
        f"{cost}-{size}" for size in ("d-ff", "num-experts") for cost in ("forward-flops", "activation-bytes")
    ]
    assert [line.name for line in charts["forward-flops-d-ff"].lines] == ["dense", "moe", "mod"]
    (peer,) = charts["activation-bytes-num-experts"].lines
    runs = [run for run in analysis["runs"] if run["arm"] == "peer"]
    assert set(peer.points) == {(4096 * run["width"], 40.0 * run["width"]) for run in runs}
    assert "num_experts of moe (16)" in study_layers.constant(analysis, told)


def test_an_inspection_is_shown_and_a_missing_one_is_asked_for(analysis, records, inspected, tmp_path):  # noqa: F811
    here = [replace(r, folder=tmp_path / "runs" / r.folder.name) for r in records]
    _, page = page_of(analysis, here, tmp_path)
    run = study_losses.runs_at_optimum(analysis, "mod", 3e13)[0]["folder"]
    assert f"sparsemix inspect runs/{run}" in page.sections["routing"]
    assert f"sparsemix generate runs/{run} --prompt" in page.sections["routing"]
    (tmp_path / "runs" / run / "inspect").mkdir(parents=True)
    (tmp_path / "runs" / run / "inspect" / "inspect.json").write_text(json.dumps(inspected), encoding="utf-8")
    (tmp_path / "runs" / run / "generation.html").touch()
    text, page = page_of(analysis, here, tmp_path)
    assert f"inspect runs/{run}" not in page.sections["routing"] and "router weights" in page.sections["routing"]
    assert f"./runs/{run}/generation.html" in page.links and 'id="mod-weights-0-title"' in text


def test_text_from_the_runs_is_escaped(analysis, records, tmp_path):
    evil = "<script>alert(1)</script>\"'&$title"
    renamed = json.loads(json.dumps(analysis).replace('"arm": "moe"', f'"arm": {json.dumps(evil)}'))
    renamed["arms"][1] = evil
    renamed |= {"command": evil, "warnings": [evil], "does_not_show": [evil], "title": evil, "convention": evil}
    text, page = page_of(renamed, [replace(r, arm=evil) if r.arm == "moe" else r for r in records], tmp_path)
    assert "<script" not in text and evil in page.sections["reproduce"]


def test_every_figure_of_the_page_is_a_file_that_holds_its_points(tmp_path):
    few = made_study({arm: ARMS[arm] for arm in ("dense", "moe")}, budgets=(1e13,), num_sizes=5, num_seeds=2)
    analysis = analyse(few, resamples=50)
    text = write_study(analysis, tmp_path / "new", few).read_text(encoding="utf-8")
    links = {link.removeprefix("figures/") for link in Page(text).links if link.startswith("figures/")}
    assert links == {path.name for path in (tmp_path / "new" / "figures").iterdir()} and len(links) > 20
    with (tmp_path / "new" / "figures" / "gaps.csv").open() as file:
        (row,) = csv.DictReader(file)
    gap = analysis["quantities"][1]
    assert float(row["value"]) == pytest.approx(gap["gap_nats"]) and float(row["low"]) == pytest.approx(
        gap["gap_nats_ci"][0]
    )
    assert json.loads((tmp_path / "new" / "analysis.json").read_text())["arms"] == ["dense", "moe"]


def test_the_page_works_in_a_browser_on_paper_and_on_a_phone(analysis, records, tmp_path, browser):  # noqa: F811
    (tmp_path / "report.html").write_text(page_of(analysis, records, tmp_path)[0], encoding="utf-8")
    wide = "return document.documentElement.scrollWidth"
    for width, dark in ((1200, False), (1200, True), (390, False), (320, True)):
        screen(browser, width, dark, phone=width < 500)
        browser.get((tmp_path / "report.html").as_uri())
        assert browser.execute_script(wide) <= width
        assert browser.execute_script(OVERLAPS) == []
    ground = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    assert ground == "rgb(22, 24, 27)"
    screen(browser, 718)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(wide) <= 718, "a page of paper has no scroll bar"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def test_the_measure_of_size_is_chosen_by_pointer_and_by_keyboard(analysis, records, tmp_path, browser):  # noqa: F811
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "report.html").write_text(page_of(analysis, records, tmp_path)[0], encoding="utf-8")
    screen(browser, 1200)
    browser.get((tmp_path / "report.html").as_uri())
    shown = """
        return ['params', 'active_params', 'forward_flops'].filter(
          size => document.querySelector('.by-' + size).getBoundingClientRect().height > 0)
    """
    assert browser.execute_script(shown) == ["params"]
    browser.find_element("id", "size-forward_flops").click()
    assert browser.execute_script(shown) == ["forward_flops"]
    browser.find_element("id", "size-forward_flops").send_keys(Keys.ARROW_LEFT)
    assert browser.execute_script(shown) == ["active_params"]
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(outline) == "solid", "the focus must be seen"
