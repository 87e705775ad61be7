"""What all charts share: the frame, axes and their ticks, markers and dashes."""

import math
from collections.abc import Callable, Sequence

from sparsemix.report.numbers import Markup, escape, fixed

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 34, 54
COLOURS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "M-3.5,-3.5h7v7h-7z",
    "M0,-4.8L4.6,3.4H-4.6z",
    "M0,-5L5,0L0,5L-5,0z",
    "M0,4.8L4.6,-3.4H-4.6z",
    "M-5,-1.6h3.4v-3.4h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4z",
    "M0,-5L4.8,-1.2L3,4.4H-3L-4.8,-1.2z",
)

Point = tuple[float, float]


class Axis:
    """Maps data in [low, high], padded a little, to pixels in [start, end]. low and high are log10 where `log`."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False) -> None:
        self.start, self.end, self.log = start, end, log
        low, high = (self._in(min(values)), self._in(max(values)))
        pad = 0.04 * (high - low) or (0.15 if log else 0.05 * abs(high) or 0.5)
        self.low, self.high = low - pad, high + pad

    def _in(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._in(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values inside, at most about `most`."""
        if not self.log:
            return nice_ticks(self.low, self.high, most)
        low, high = 10**self.low, 10**self.high
        found = log_ticks(low, high)
        if len(found) > most:
            tens = log_ticks(low, high, (1,))
            found = tens if len(tens) > 2 else found[::2]
        # Less than a decade: round numbers at even steps say more.
        return found[:: -(-len(found) // most)] if len(found) > 2 else nice_ticks(low, high, min(most, 4))


def nice_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most about `most` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    return [step * count for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, factors: Sequence[int] = ()) -> list[float]:
    """The powers of ten inside [low, high], with their multiples by 2 and 5 where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = factors or ((1, 2, 5) if last - first < 4 else (1,))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many decimals as their step needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1
    decimals = max(0, -math.floor(math.log10(step or 1) + 1e-9))
    return [fixed(tick + 0.0, decimals) for tick in ticks]


def spread(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points, evenly spaced, first and last kept."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def grid(y_axis: Axis, text: Callable[[float], str] | None = None) -> str:
    """Horizontal lines at round values, labelled by `text` or with as many decimals as they need."""
    ticks = y_axis.ticks()
    labels = [text(tick) for tick in ticks] if text else tick_labels(ticks)
    parts = []
    for tick, label in zip(ticks, labels, strict=True):
        y = y_axis(tick)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y:.1f}" dy=".35em" text-anchor="end">{escape(label)}</text>')
    return "".join(parts)


def x_ticks(pixels: Sequence[float], labels: Sequence[str], left: float = LEFT, bottom: float = HEIGHT - BOTTOM) -> str:
    """The x axis with its labels."""
    parts = [f'<path class="axis" d="M{left},{bottom}H{WIDTH - RIGHT}"/>']
    for x, label in zip(pixels, labels, strict=True):
        parts.append(f'<path class="axis" d="M{x:.1f},{bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 8}" dy=".8em" text-anchor="middle">{label}</text>')
    return "".join(parts)


def axis_titles(x_label: str, y_label: str = "", left: float = LEFT, height: float = HEIGHT) -> str:
    """What the axes show."""
    middle = (left + WIDTH - RIGHT) / 2
    return (
        f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" x="2" y="16">{escape(y_label)}</text>'
    )


def frame(id: str, title: str, description: str, parts: Sequence[str], height: float) -> Markup:
    """The <svg> with its name and its description for who does not see it."""
    return Markup(
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:g}" aria-labelledby="{id}-title {id}-desc">'
        f'<title id="{id}-title">{escape(title)}</title><desc id="{id}-desc">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
