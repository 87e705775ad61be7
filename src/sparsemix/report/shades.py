"""Colours for the number of blocks that processed a token: more blocks, more colour, the same to every eye."""

from typing import NamedTuple

# Each gets lighter or darker all the way, so that colour blindness and grey print leave the order as it is.
LIGHT = ("#ffffff", "#c6dbef", "#6baed6", "#2171b5", "#08306b")
DARK = ("#16181b", "#1c3f63", "#2b78b8", "#7fb9e0", "#e3eff9")
# On a terminal of unknown ground: Okabe and Ito's blue, sky blue and yellow, which every eye tells apart.
TERMINAL = ("#1b3a6b", "#2f73b8", "#56b4e9", "#b2d488", "#f0e442")


class Shade(NamedTuple):
    """Ground and ink of a token."""

    ground: str
    ink: str


def shade(share: float, ramp: tuple[str, ...]) -> Shade:
    """The colour at `share` of a ramp, in [0, 1], with the ink, black or white, that reads better on it."""
    place = share * (len(ramp) - 1)
    at = min(int(place), len(ramp) - 2)
    low, high = _channels(ramp[at]), _channels(ramp[at + 1])
    mixed = [round(a + (place - at) * (b - a)) for a, b in zip(low, high, strict=True)]
    ground = "#" + "".join(f"{channel:02x}" for channel in mixed)
    return Shade(ground, max(("#000000", "#ffffff"), key=lambda ink: contrast(ground, ink)))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours as WCAG 2.2 has it, 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
