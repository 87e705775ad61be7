"""Parts of a page: sections of text, tables and figures."""

from collections.abc import Sequence
from typing import NamedTuple


class TextTable(NamedTuple):
    """A table of words: what it shows, its columns, its rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
