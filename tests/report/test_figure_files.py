"""Figures as files, and the page that is made of plain parts."""

import csv
import io
import re
import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest
from test_page import Page, browser, picture, screen  # noqa: F401  (a fixture)

from sparsemix.report.figure_files import standalone, to_csv, write_figure
from sparsemix.report.figures import Bars, Chart, Dots, Line, Star
from sparsemix.report.numbers import si
from sparsemix.report.simple_page import Section, TextTable, simple_page

FIT = [(1e6 * 1.3**i, 4.0 + 0.02 * (i - 5) ** 2) for i in range(11)]
CURVE = Chart(
    "curve", "Loss against size", "parameters", "test loss (nats)",
    [
        Line("10 TFLOP", 1, FIT[::2], path=FIT, star=Star(FIT[5][0], 4.0, (2.9e6, 4.9e6), (3.98, 4.03))),
        Line("30 TFLOP <&>", 2, [(x, y - 0.3) for x, y in FIT[::3]], bars=[(3.6, 3.9), None, (3.7, 3.9), None]),
    ],
    log_x=True, x_text=si, references=[("baseline", 3.9)], x_references=[("dense", 2e6)],
)  # fmt: skip
BARS = Bars("bars", "Tokens by depth", "layers", [5.0, 3.0, 2.0], 2)
DOTS = Dots(
    "dots",
    "Gap",
    "nats",
    [
        ("moe", 1, -0.02, -0.03, -0.01),
        ("peer@ternary, 1e13", 2, 0.01, -0.01, 0.03),
        ("expert_choice, 1e13", 3, 0.0, -0.01, 0.01),
    ],
)
SHAPES = [CURVE, BARS, DOTS]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
def test_a_figure_is_written_as_svg_png_and_csv(shape, tmp_path):
    write_figure(shape, tmp_path / "new" / "figures")
    files = {path.name: path for path in (tmp_path / "new" / "figures").iterdir()}
    assert set(files) == {f"{shape.id}.{kind}" for kind in ("svg", "png", "csv")}
    root = ET.fromstring(files[f"{shape.id}.svg"].read_text(encoding="utf-8"))
    assert root.tag.endswith("svg") and shape.title in "".join(root.itertext())
    assert "var(" not in standalone(shape)
    image = matplotlib.image.imread(files[f"{shape.id}.png"])[..., :3]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_the_csv_holds_what_is_plotted_and_its_intervals():
    rows = list(csv.DictReader(io.StringIO(to_csv(CURVE))))
    points = [(float(r["x"]), float(r["y"])) for r in rows if r["series"] == "10 TFLOP" and r["what"] == "point"]
    assert points == [pytest.approx(point) for point in FIT[::2]]
    assert sum(r["what"] == "fit" for r in rows) == len(FIT)
    (star,) = [r for r in rows if r["what"] == "optimum"]
    assert [float(star[n]) for n in ("x_low", "x_high", "y_low", "y_high")] == [2.9e6, 4.9e6, 3.98, 4.03]
    bars = [(r["y_low"], r["y_high"]) for r in rows if r["series"] == "30 TFLOP <&>"]
    assert bars == [("3.6", "3.9"), ("", ""), ("3.7", "3.9"), ("", "")]
    assert to_csv(DOTS).splitlines()[1] == "moe,-0.02,-0.03,-0.01"
    assert to_csv(BARS).splitlines()[2] == "1,3,30,,"


def test_a_long_name_of_a_dot_is_broken_and_not_cut():
    names = re.findall(r'<text y="\S+" text-anchor="end">(.*?)</text>', DOTS.svg())
    assert [re.sub("<[^>]*>", "|", name) for name in names] == [
        "|moe|", "|peer||@ternary, 1e13|", "|expert_choice||1e13|",
    ]  # fmt: skip


def test_an_interval_without_end_stays_inside_the_frame():
    far = Star(FIT[5][0], 4.0, (float("-inf"), float("inf")), (3.98, 400.0))
    svg = Chart("far", "Far", "x", "y", [Line("a", 1, FIT, star=far)], log_x=True).svg()
    assert "inf" not in svg and "nan" not in svg
    bars = re.findall(r'class="bar-line" d="M([\d.]+),([\d.]+)[HV]([\d.]+)', svg)
    assert len(bars) == 2 and all(0 <= float(n) <= 560 for bar in bars for n in bar)
    wide = Chart("far", "Far", "x", "y", [Line("a", 1, FIT, star=Star(FIT[5][0], 4.0))], log_x=True)
    low, high = (Chart("f", "F", "x", "y", [Line("a", 1, FIT, star=far)]).axes()[1], wide.axes()[1])
    assert low.high - low.low < 3 * (high.high - high.low), "an interval must not flatten the points"


def test_a_page_of_plain_parts_is_whole_and_links_to_its_files():
    rows = [("dense", "4.1 [4.0, 4.2]", "baseline"), ("moe", "−0.02", "<better>")]
    sections = [
        Section("What & why", ["One <b>.", "Two."], [TextTable("Losses", ("arm", "nats", "verdict"), rows)], SHAPES),
        Section("Empty"),
    ]
    text = simple_page("A study", sections, "now", ["few runs"], "figures")
    page = Page(text)
    assert not page.wrong and not page.open and list(page.sections) == ["warnings", "section-0"]
    assert "few runs" in page.sections["warnings"] and "One <b>." in page.sections["section-0"]
    assert "figures/curve.svg" in page.links and "figures/dots.csv" in page.links
    assert '<td class="text">&lt;better&gt;</td>' in text and "<td>4.1 [4.0, 4.2]</td>" in text
    assert "figures/" not in simple_page("A study", sections)
    with pytest.raises(AssertionError, match="share an id"):
        simple_page("A study", [Section("a", figures=SHAPES), Section("b", figures=[BARS])])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
def test_a_figure_outside_its_page_keeps_its_text_apart_and_its_colours(shape, tmp_path, browser):  # noqa: F811
    (tmp_path / f"{shape.id}.svg").write_text(standalone(shape), encoding="utf-8")
    screen(browser, 1200, height=800)
    browser.get((tmp_path / f"{shape.id}.svg").as_uri())
    overlaps = """
        const all = [...document.querySelectorAll('text')].filter(t => t.textContent);
        const boxes = all.map(t => [t.textContent, t.getBoundingClientRect()]), bad = [];
        boxes.forEach(([t, a], i) => {
          if (a.left < 0 || a.right > 1122 || a.top < 0) bad.push(t);
          boxes.slice(i + 1).forEach(([u, b]) => {
            const apart = a.left >= b.right || b.left >= a.right || a.top + 4 >= b.bottom || b.top + 4 >= a.bottom;
            if (!apart) bad.push(t + '/' + u);
          });
        });
        return bad;
    """
    assert browser.execute_script(overlaps) == []
    seen = {tuple(colour) for colour in (picture(browser).reshape(-1, 3) * 255).round().astype(int)}
    assert (0xD5, 0x5E, 0x00) in seen, "the second style's orange"
