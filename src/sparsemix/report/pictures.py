"""A figure of the page as a PNG."""

import io

from matplotlib.figure import Figure

from sparsemix.report.figures import Bars, Chart
from sparsemix.report.numbers import fixed

# The page's colours by style (see page.html), so that a line has the same one in both.
PALETTE = ("#1a1a1a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a89a00")


def png(shape: Chart | Bars) -> bytes:
    """The chart or the bars, 1120 x 640 pixels."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if isinstance(shape, Chart):
        for line in shape.lines:
            colour = PALETTE[(line.style if line.colour is None else line.colour) % len(PALETTE)]
            xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
            style = ("-", "--", ":", "-.")[line.style % 4]
            axes.plot(xs, ys, style, color=colour, label=line.name)
        for name, y in shape.references:
            axes.axhline(y, color="0.5", lw=0.8, ls=":", label=name)
        axes.set_xscale("log" if shape.log_x else "linear")
        axes.set_yscale("log" if shape.log_y else "linear")
        axes.legend(frameon=False, fontsize="small")
    else:
        colour, shares = PALETTE[shape.style % len(PALETTE)], shape.shares()
        if shape.edges:
            axes.stairs(shares, shape.edges, fill=True, color=colour)
        else:
            drawn = axes.bar(shape.called(), shares, color=colour)
            axes.bar_label(drawn, [fixed(share, 1) for share in shares], fontsize="small")
    axes.set(title=shape.title, xlabel=shape.x_label, ylabel=shape.y_label)
    if not (isinstance(shape, Chart) and shape.log_y):
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=160, format="png")
    return stream.getvalue()
