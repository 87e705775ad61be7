"""A figure as files: an SVG that stands alone, a PNG, and the plotted numbers as CSV."""

import csv
import io
import re
from pathlib import Path
from typing import Any

from sparsemix.durable import write_atomic
from sparsemix.report.figures import CSS, Chart, Shape
from sparsemix.report.figures.axes import RIGHT, WIDTH
from sparsemix.report.figures.chart import sample
from sparsemix.report.numbers import escape
from sparsemix.report.palette import LIGHT

SANS = '"Helvetica Neue", "Liberation Sans", Arial, sans-serif'
TITLE, ROW = 26, 18


def write_figure(shape: Shape, folder: Path) -> None:
    """Write ID.svg, ID.png and ID.csv, ID the figure's, into `folder`, which is made; all are made before the first
    is written. Raises OSError."""
    from sparsemix.report.pictures import png

    contents = {"svg": standalone(shape), "png": png(shape), "csv": to_csv(shape)}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in contents.items():
        write_atomic(folder / f"{shape.id}.{kind}", content)


def to_csv(shape: Shape) -> str:
    """Exactly what the figure shows, a line a point; a number that there is none of is empty."""
    columns, rows = shape.rows()
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([columns, *([_plain(cell) for cell in row] for row in rows)])
    return stream.getvalue()


def _plain(cell: Any) -> Any:
    # Ten digits are more than any estimate here has, and fewer than rounding errors show in.
    return f"{cell:.10g}" if isinstance(cell, float) else cell


def standalone(shape: Shape) -> str:
    """The figure on white with its title, its legend and its style inside. Colours are written out, as viewers other
    than browsers know no CSS variables."""
    inner = shape.svg()
    height = float(re.findall(r'viewBox="0 0 \d+ ([\d.]+)"', inner)[0])
    legend, rows = _legend(shape)
    top = TITLE + ROW * rows
    style = CSS.read_text(encoding="utf-8")
    for name, colour in [*LIGHT.items(), ("sans", SANS)]:
        style = style.replace(f"var(--{name})", colour)
    inner = inner.replace('<svg role="img" ', f'<svg y="{top}" width="{WIDTH}" height="{height:g}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{2 * WIDTH}" height="{2 * (top + height):g}" '
        f'viewBox="0 0 {WIDTH} {top + height:g}" aria-labelledby="{shape.id}-title {shape.id}-desc">'
        f"<style>{style}svg .title {{ font-size: 13px; font-weight: 600; fill: {LIGHT['ink']}; }}</style>"
        f'<rect width="100%" height="100%" fill="{LIGHT["ground"]}"/>'
        f'<text class="title" x="2" y="17">{escape(shape.title)}</text>{legend}{inner}</svg>\n'
    )


def _legend(shape: Shape) -> tuple[str, int]:
    """The legend's lines below the title, wrapped, and how many rows they take."""
    if not isinstance(shape, Chart) or len(shape.lines) < 2:
        return "", 0
    parts, x, row = [], 2.0, 0
    for line in shape.lines:
        # There is no measuring of text here: 5.8 is above the mean width of a letter at this size.
        width = 40 + 5.8 * len(line.name)
        if x > 2 and x + width > WIDTH - RIGHT:
            x, row = 2.0, row + 1
        y = TITLE + ROW * row
        drawn = sample(line).replace("<svg ", f'<svg x="{x:.0f}" y="{y}" width="34" height="12" ', 1)
        parts.append(f'{drawn}<text class="label" x="{x + 40:.0f}" y="{y + 10}">{escape(line.name)}</text>')
        x += width + 16
    return f'<g class="legend">{"".join(parts)}</g>', row + 1
