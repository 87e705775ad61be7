"""Maps of shares: a cell for every number, in the SVG, the PNG and the CSV."""

import dataclasses
import re

from sparsemix.report.figure_files import write_figure
from sparsemix.report.figures import HeatMap

MAP = HeatMap("taken", "Taken", "position", "block", ["block 0", "block 1"], [0, 2, 4, 7], [[1, 1, 1], [0, 0.5, 0.25]])


def test_every_share_is_a_cell_as_opaque_as_it_is_large():
    svg = MAP.svg()
    assert re.findall(r'fill-opacity="([\d.]+)"', svg) == ["1.00", "1.00", "1.00", "0.00", "0.50", "0.25"]
    rows = [float(y) for y in re.findall(r'<rect[^>]* y="([\d.]+)"', svg)]
    assert len(set(rows)) == 2 and rows[0] > rows[-1], "the first row is the lowest"
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', svg)]
    assert widths[0] == widths[1] and round(widths[2] / widths[0], 2) == 1.5


def test_who_does_not_see_it_is_told_the_means():
    assert "block 0: 100.0 %; block 1: 25.0 %" in MAP.svg()


def test_a_pointer_is_told_what_is_in_a_span():
    said = dataclasses.replace(MAP, spans=["a <b>", "c", "d"]).svg()
    assert "<title>block 1, c: 50 %</title>" in said and "block 0, a &lt;b&gt;: 100 %" in said
    assert "<title>block 1, 2 to 4: 50 %</title>" in MAP.svg()


def test_its_files_hold_every_number(tmp_path):
    write_figure(MAP, tmp_path)
    assert (tmp_path / "taken.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "taken.svg").read_text(encoding="utf-8").count("<rect class") == 6
    lines = (tmp_path / "taken.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "row,low_edge,high_edge,share" and lines[-1] == "block 1,4,7,0.25" and len(lines) == 7
