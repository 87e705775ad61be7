"""Charts as inline SVG. Colours are CSS classes `s0`...`s7`, so that light, dark and
print follow the page; markers and dashes differ as well, so that no chart needs its colours."""

from pathlib import Path

from sparsemix.report.figures.axes import Point, log_ticks, nice_ticks, tick_labels
from sparsemix.report.figures.bars import Bars, Dots
from sparsemix.report.figures.chart import Chart, Line, Star, legend
from sparsemix.report.figures.heat_map import HeatMap

__all__ = [
    "CSS",
    "Bars",
    "Chart",
    "Dots",
    "HeatMap",
    "Line",
    "Point",
    "Shape",
    "Star",
    "legend",
    "log_ticks",
    "nice_ticks",
    "tick_labels",
]

# What a page and a folder of figures can hold.
Shape = Chart | Bars | Dots | HeatMap
# Rules for charts wherever they stand; the colours' names are `palette`'s.
CSS = Path(__file__).with_name("figure.css")
