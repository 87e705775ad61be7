"""The page of an inspection, from a made-up result with every kind of statistic."""

import json

import numpy as np
import pytest
from test_page import Page, browser, picture, screen  # noqa: F401  (a fixture)

from sparsemix.evaluate.correlation import correlations
from sparsemix.evaluate.routing import expert_details, predictor_report, taken_report
from sparsemix.inputs import read_mapping
from sparsemix.report.inspect_page import figures_of, page_of, write_inspection


def experts(num_experts, skew, rows=1):
    counts = 4e5 * np.arange(1, num_experts + 1) ** -skew
    histogram = np.exp(-np.arange(20.0))
    return {"kind": "moe", **expert_details(counts, counts**1.1, histogram, 65536, 65536 * rows)}


def mod_layer(rate):
    return {
        "kind": "mod", "tokens": 65536, "routed_rate": rate, "weights": list(range(20)), "above_half": 0.31,
        "guess": {"edges": np.linspace(-12.5, 3.1, 21).tolist(), "counts": [5] * 20},
        "predictor": predictor_report(np.array([6.0, 2.0, 4.0, 28.0])),
    }  # fmt: skip


@pytest.fixture
def inspected():
    rng = np.random.default_rng(0)
    x, docs = rng.normal(size=300), np.repeat(np.arange(30), 10)
    taken = {
        "kind": "expert_choice",
        **experts(8, 0.2),
        "taken": taken_report(np.array([9.0, 30, 12, 0, 0, 0, 0, 0, 0])),
    }
    run = {
        "run": "mod-0-26564b9a49", "kinds": ["mod"], "text": ["docs/*.md"], "tokens": 65536, "documents": 30,
        "nats_per_token": 4.2, "passes": [40000, 20000, 5536],
        "experts": {"blocks.1.inner.ffn": experts(65536, 0.7), "blocks.2.ffn.inner": experts(40, 0.1, 4)}
        | {f"blocks.{i}.ffn": taken for i in (5, 7)},
        "mod": {f"blocks.{i}": mod_layer(0.12 + i / 100) for i in range(1, 24, 2)},
        "loss_by_depth": [{"depth": i, "tokens": 100, "nats": 3.0 + i} for i in range(3)],
        "correlation": {"depth": {"loss": correlations(x, x + rng.normal(size=300), docs)}},
        "warnings": ["blocks.1.inner.ffn: usage is a lower bound"],
    }  # fmt: skip
    return json.loads(json.dumps({"folder": "mod-0-26564b9a49", "runs": [run]}))


def test_the_page_is_whole_and_fetches_nothing(inspected):
    page = Page(page_of(inspected))
    assert not page.wrong and not page.open and len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert [link for link in page.links if not link.startswith("#")] == ["data:,"]
    text = page.sections["run-0"]
    for said in ("usage is a lower bound", "sub-token", "by several", "F1", "Spearman"):
        assert said in text
    assert "None" not in text and "nan" not in text


def test_two_runs_share_no_id(inspected):
    inspected["runs"] *= 2
    page = Page(page_of(inspected))
    assert len(set(page.ids)) == len(page.ids) and {"run-0", "run-1", "reading"} == set(page.sections)


def test_text_from_the_result_is_escaped(inspected):
    evil = "<script>alert(1)</script>\"'&$title"
    run = inspected["runs"][0]
    run.update(run=evil, text=[evil], warnings=[evil])
    for part in ("experts", "mod", "correlation"):
        run[part] = dict.fromkeys([evil], next(iter(run[part].values())))
    assert "<script" not in page_of(inspected)


def test_what_was_not_measured_leaves_no_empty_table(inspected):
    run = inspected["runs"][0]
    run.update(experts={}, mod={}, passes=None, loss_by_depth=[], correlation={}, nats_per_token=None)
    page = Page(page_of(inspected))
    assert "Mixture-of-Depths" not in page.sections["run-0"] and not figures_of(run)


def test_every_figure_has_its_picture(inspected, tmp_path):
    mod = inspected["runs"][0]["mod"]
    inspected["runs"][0]["mod"] = {name: mod[name] for name in list(mod)[:2]}
    write_inspection(inspected, tmp_path / "new" / "place")
    names = {figure.name for figure in figures_of(inspected["runs"][0])}
    assert {path.stem for path in (tmp_path / "new" / "place").glob("*.png")} == names
    assert {"load", "activation", "routed", "passes", "gates-0", "taken-2", "weights-1", "guess-1"} <= names
    assert read_mapping(tmp_path / "new" / "place" / "inspect.json") == inspected


OVERLAPS = """
    const bad = [];
    for (const svg of document.querySelectorAll('figure > svg')) {
      const frame = svg.getBoundingClientRect();
      const boxes = [...svg.querySelectorAll('text')].filter(t => t.textContent).map(
        t => [t.textContent, t.getBoundingClientRect()]);
      boxes.forEach(([t, a], i) => {
        if (a.left < frame.left - 2 || a.right > frame.right + 2 || a.top < frame.top - 2 ||
            a.bottom > frame.bottom + 2)
          bad.push(t);
        boxes.slice(i + 1).forEach(([u, b]) => {
          if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
            bad.push(t + '/' + u);
        });
      });
    }
    return bad;
"""


def test_the_page_works_in_a_browser_light_dark_and_on_a_phone(inspected, tmp_path, browser):  # noqa: F811
    (tmp_path / "inspect.html").write_text(page_of(inspected), encoding="utf-8")
    for width, dark in ((1200, False), (1200, True), (390, False), (320, False)):
        screen(browser, width, dark, phone=width < 500)
        browser.get((tmp_path / "inspect.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OVERLAPS) == []
        shades = picture(browser)
        assert len(np.unique(shades.reshape(-1, 3), axis=0)) > 50 and (shades[0, 0].max() < 0.2) == dark
    heights = "return [...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().height)"
    found = browser.execute_script(heights)
    assert len(found) == len(figures_of(inspected["runs"][0])) and min(found) > 100
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
