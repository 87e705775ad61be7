import io
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from sparsemix.report.page import write_report

SECTIONS = ["verdict", "table", "loss-flops", "loss-time", "lr", "cost", "routing", "fairness", "data", "reproduce"]


class Page(HTMLParser):
    """Text of each section, every link, and the tags whose end is missing or wrong."""

    VOID = ("meta", "link", "br", "hr", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.links, self.ids, self.wrong = [], {}, [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.links += [known[name] for name in ("href", "src", "action", "data", "xlink:href") if name in known]
        self.ids += [known["id"]] if "id" in known else []
        if tag not in self.VOID:
            self.open.append((tag, known.get("id")))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        for tag, name in self.open:
            if tag == "section":
                self.sections[name] = self.sections.get(name, "") + data.replace("\u00a0", " ")


@pytest.fixture
def written(tmp_path):
    def write(result):
        path = tmp_path / "comparison" / "report.html"
        write_report(json.loads(json.dumps(result)), path)
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        assert not page.wrong and not page.open
        assert len(set(page.ids)) == len(page.ids)
        return text, page, path

    return write


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, chromedriver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        reason = "no Chromium: install the system packages `chromium` and `chromium-driver`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    for flag in [
        *quiet.split(),
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def screen(driver, width, dark=False, height=900, phone=False):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def picture(driver):
    return matplotlib.image.imread(io.BytesIO(driver.get_screenshot_as_png()))[..., :3]


def test_the_page_works_in_a_browser_light_dark_and_on_a_phone(result, written, browser):
    _, _, path = written(result)
    screen(browser, 1200)
    browser.get(path.as_uri())
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('section')].map(s => [s.id, s.innerText.length])"
    )
    assert [name for name, _ in sizes] == SECTIONS and min(length for _, length in sizes) > 100
    shapes = "return [...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().height)"
    assert len(browser.execute_script(shapes)) == 10 and min(browser.execute_script(shapes)) > 100
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0

    light = picture(browser)
    assert len(np.unique(light.reshape(-1, 3), axis=0)) > 50 and light[0, 0].min() > 0.9
    screen(browser, 1200, dark=True)
    dark = picture(browser)
    assert len(np.unique(dark.reshape(-1, 3), axis=0)) > 50 and dark[0, 0].max() < 0.2

    cut = "return [...document.querySelectorAll('.scroll')].filter(b => b.scrollWidth > b.clientWidth).length"
    assert browser.execute_script(cut) == 0
    wide = "return document.documentElement.scrollWidth"
    for width in (320, 390, 768, 1200):
        screen(browser, width, phone=width < 500)
        assert browser.execute_script(wide) <= width
    screen(browser, 390, phone=True)
    letters = (
        "return Math.min(...[...document.querySelectorAll('figure > svg text')]"
        ".filter(t => t.textContent).map(t => t.getBoundingClientRect().height))"
    )
    assert browser.execute_script(letters) >= 9
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<div style=\"width: 900px\">x</div>')")
    assert browser.execute_script(wide) > 390, "the measure of horizontal overflow must notice an overflow"
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def test_no_text_of_a_chart_leaves_its_frame_or_covers_another(result, written, browser):
    _, _, path = written(result)
    overlaps = """
        const bad = [];
        for (const svg of document.querySelectorAll('figure > svg')) {
          const frame = svg.getBoundingClientRect();
          const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent);
          const boxes = texts.map(t => [t, t.getBoundingClientRect()]);
          boxes.forEach(([t, a], i) => {
            if (a.left < frame.left - 2 || a.right > frame.right + 2) bad.push(t.textContent);
            if (a.top < frame.top - 2 || a.bottom > frame.bottom + 2) bad.push(t.textContent);
            boxes.slice(i + 1).forEach(([u, b]) => {
              if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
                bad.push(t.textContent + ' / ' + u.textContent);
            });
          });
        }
        return bad;
    """
    for width in (390, 1200):
        screen(browser, width, phone=width < 500)
        browser.get(path.as_uri())
        assert browser.execute_script(overlaps) == []


def test_the_page_fetches_nothing_and_runs_nothing(result, written):
    text, page, _ = written(result)
    folders = [f"./{run['folder']}/" for row in result["rows"] for run in row["runs"]]
    assert sorted(link for link in page.links if not link.startswith("#")) == sorted([*folders, "data:,"])
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.search(r"https?:|@import|url\(|<script|<iframe|javascript:", text)


@pytest.mark.parametrize("empty", [{}, {"rows": [{}]}, {"rows": [{"kind": "peer", "runs": [{}]}], "corpus": {}}])
def test_missing_values_show_a_dash(empty, written):
    _, page, _ = written(empty)
    assert list(page.sections) == [name for name in SECTIONS if name != "lr"]
    assert all("–" in text for text in page.sections.values())
    assert not re.search(r"\bNone\b|\bnan\b", " ".join(page.sections.values()))


@pytest.mark.parametrize(
    "missing", ["bpb", "bpb_ci", "difference", "difference_ci", "cost_items", "runs", "routing", "lr"]
)
def test_one_missing_value_leaves_the_other_kinds_as_they_were(missing, result, written):
    result["rows"][1][missing] = None
    _, page, _ = written(result)
    assert list(page.sections) == SECTIONS and "–" in page.sections["table"] and "1.4467" in page.sections["table"]


def test_text_from_the_result_is_escaped(result, written):
    evil = "<script>alert(1)</script>\"'&$title"
    result["rows"][1].update(kind=evil, verdict=evil)
    result["rows"][1]["runs"][0]["folder"] = '"><script>/../x'
    result["lr_sweep"][evil] = result["lr_sweep"].pop("moe")
    result.update(
        command=evil, scope=evil, warnings=[evil], hardware=evil, versions={evil: evil}, settings={evil: evil}
    )
    result["corpus"].update(sources=[evil], tokenizer=evil, fingerprint=evil)
    text, page, _ = written(result)
    assert "<script" not in text
    assert all(evil in page.sections[name] for name in SECTIONS if name != "fairness" or evil in page.sections[name])
    assert "./%22%3E%3Cscript%3E/../x/" in page.links


def test_a_diverged_kind_is_said_to_have_diverged_and_is_ranked_last(result, written):
    result["rows"][0]["bpb"] = result["rows"][0]["runs"][0]["curve"][3]["bpb"] = math.nan
    text, page, _ = written(result)
    rows = re.findall(r'<th scope="row">(\w+)</th><td>(.*?)</td>', text)
    assert rows[:5] == [("moe", "1.4405"), ("peer", "1.4467"), ("mh_moe", "1.4698"), ("mod", "1.4821"), rows[4]]
    assert rows[4] == ("dense", "not finite")
    assert "against" not in page.sections["verdict"].split(".")[0]


def test_the_headline_names_the_lowest_loss_and_every_verdict(result, written):
    _, page, _ = written(result)
    text = page.sections["verdict"]
    assert "With 1.20 PFLOP of training each, moe has the lowest mean loss: 1.4405 bits per byte" in text
    assert "against 1.4712 for dense" in text and "moe −0.0307 [−0.0377, −0.0237]: better" in text
    assert "mh_moe −0.0014 [−0.0084, +0.0056]: not resolved" in text and "mod +0.0109 [+0.0039, +0.0179]: worse" in text
    assert result["scope"] in text and result["warnings"][0] in text


def test_an_untuned_learning_rate_and_unequal_seeds_are_admitted(result, written):
    assert "same sweep" in written(result)[1].sections["fairness"]
    result["tuned"] = False
    del result["rows"][2]["runs"][0]
    text = written(result)[1].sections["fairness"]
    assert "not tuned" in text and "Not the seeds" in text and "same sweep" not in text


def test_the_best_rate_at_the_edge_of_its_sweep_is_reported(result, written):
    assert "edge" not in written(result)[1].sections["lr"]
    result["lr_sweep"]["peer"] = result["lr_sweep"]["peer"][1:]
    assert "not yet the best: peer" in written(result)[1].sections["lr"]


def test_the_constant_skip_stands_beside_the_predictor(result, written):
    assert re.search(r"blocks\.1\s*12\.5 %\s*11\.8 %\s*93\.1 %\s*87\.5 %", written(result)[1].sections["routing"])


MANY = [f"{kind}{at}" for kind in ("dense", "expert_choice", "peer", "mh_moe", "pkm", "mod") for at in ("", "@ternary")]


@pytest.fixture
def crowded(result):
    """Twelve kinds, half of them with a precision in their name."""
    rows = [result["rows"][i % 5] for i in range(len(MANY))]
    result["rows"] = [
        row
        | {"kind": kind, "runs": [run | {"folder": f"{kind}-0-ab"} for run in row["runs"]]}
        | ({} if kind == "dense" else {"difference": 0.01 * i - 0.05, "difference_ci": [0.01 * i - 0.06, 0.01 * i]})
        for i, (kind, row) in enumerate(zip(MANY, rows, strict=True))
    ]
    result["lr_sweep"] = dict.fromkeys(MANY, result["lr_sweep"]["moe"])
    return result


def test_twelve_kinds_stay_apart_by_marker_and_dash_and_by_marker_and_colour(crowded, written):
    text, page, _ = written(crowded)
    chart = re.findall(r'<ul class="legend">.*?</ul>', text)[0]
    samples = re.findall(r'class="(s\d)"><path class="mean" stroke-dasharray="(.*?)".*?/><path d="(.*?)"', chart)
    assert len(samples) == len(MANY)
    assert len({(dash, marker) for _, dash, marker in samples}) == len(MANY)
    assert len({(colour, marker) for colour, _, marker in samples}) == len(MANY)
    assert all(kind in page.sections["table"] for kind in MANY)
    assert "./dense%40ternary-0-ab/" in page.links
    for kind in MANY[1:]:
        name, at, precision = kind.partition("@")
        whole = f">{name}</tspan>" + (f".*?>@{precision}</tspan></text>" if at else "</text>")
        assert re.search(whole, text), "its name is whole in the chart of differences"


def test_no_text_of_a_crowded_chart_leaves_its_frame_or_covers_another(crowded, written, browser):
    test_no_text_of_a_chart_leaves_its_frame_or_covers_another(crowded, written, browser)
