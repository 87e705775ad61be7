"""A page of headings, paragraphs, tables and figures, for commands that need no layout of their own."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from sparsemix.report.figures import Chart, Shape, legend
from sparsemix.report.numbers import Markup, escape
from sparsemix.report.page import join, paragraph, render, warned
from sparsemix.report.plots import figure
from sparsemix.report.tables import table


class TextTable(NamedTuple):
    """A table whose first column names its rows. Columns whose cells are words are aligned left."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> Markup:
        """As HTML."""
        words = [i for i in range(len(self.columns)) if any(_is_word(row[i]) for row in self.rows)]
        return table(self.caption, self.columns, self.rows, text=words)


class Section(NamedTuple):
    """A heading, and below it paragraphs, then tables, then figures."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[TextTable] = ()
    figures: Sequence[Shape] = ()


def simple_page(
    title: str, sections: Sequence[Section], byline: str = "", warnings: Sequence[str] = (), files: str = ""
) -> str:
    """The page; sections without content are left out. `files`: where, as seen from the page, `write_figure` wrote the
    figures, to which it then links. Figures must differ in id."""
    ids = [shape.id for section in sections for shape in section.figures]
    assert len(ids) == len(set(ids)), f"figures share an id: {ids}"
    shown = [(f"section-{i}", escape(s.title), _body(s, files)) for i, s in enumerate(sections)]
    if warnings:
        shown.insert(0, ("warnings", "Warnings", warned(warnings)))
    return render(title, byline, shown)


def _body(section: Section, files: str) -> Markup:
    drawn = [drawn_figure(shape, "", files) for shape in section.figures]
    figures = Markup(f'<div class="pair">{"".join(drawn)}</div>') if len(drawn) > 1 else "".join(drawn)
    return join(*map(paragraph, section.text), *(one.html() for one in section.tables), figures)


def drawn_figure(shape: Shape, caption: str, files: str = "") -> Markup:
    """The figure with title, legend and caption, and links to its files in the folder `files` if there is one."""
    key = legend(shape.lines) if isinstance(shape, Chart) and len(shape.lines) > 1 else Markup("")
    links = " ".join(
        f'<a href="{escape(files)}/{shape.id}.{kind}" aria-label="{escape(shape.title)} as {kind.upper()}">'
        f"{kind.upper()}</a>"
        for kind in (("svg", "png", "csv") if files else ())
    )
    title = Markup(f'<p class="figure-title">{escape(shape.title)}</p>')
    said = Markup(f'{escape(caption)} <span class="files">{links}</span>') if files else caption
    return figure(shape.svg(), said, Markup(title + key))


def _is_word(cell: str) -> bool:
    # Numbers with signs, units, intervals and dashes stay aligned right; a sentence that begins with one does not.
    number = re.fullmatch(r"[<≥]?[\s\[]*[+−-]?\d.*|[–-]?", str(cell))
    return not number or len(re.findall(r"[A-Za-z]{3,}", str(cell))) > 1
