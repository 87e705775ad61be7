"""Numbers as people read them, and escaped text: what every table and chart of the page prints."""

import html
import math
from typing import Any

DASH = "–"
# No line break between a number and its unit.
SPACE = "\u00a0"
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


class Markup(str):
    """HTML that is already escaped."""


def escape(value: object) -> str:
    """`value` as HTML text: Markup as it is, None as a dash, all else escaped."""
    return value if isinstance(value, Markup) else DASH if value is None else html.escape(str(value))


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number that a chart can place."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fixed(value: Any, decimals: int, signed: bool = False) -> str:
    """'−0.0123': a number with so many decimals; a dash if missing; 'not finite' if it diverged."""
    if is_number(value):
        text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
        return text.replace("-", "−")
    return DASH if value is None else "not finite" if isinstance(value, float) else str(value)


def si(value: Any, unit: str = "") -> str:
    """'1.23 MB': three digits, SI prefix and unit; whole numbers below 1000 as they are."""
    if not is_number(value):
        return fixed(value, 0)
    power = prefix_power(value)
    scaled = float(f"{value:.3g}") / 1000**power
    whole = power == 0 and scaled == int(scaled)
    digits = 0 if whole else max(0, 2 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:.{min(digits, 6)}f}{SPACE}{PREFIXES[power]}{unit}".rstrip().replace("-", "−")


def prefix_power(value: float) -> int:
    """The power of 1000 whose SI prefix suits `value`, after rounding to three digits."""
    rounded = abs(float(f"{value:.3g}"))
    return min(max(math.floor(math.log10(rounded) / 3), 0), len(PREFIXES) - 1) if rounded else 0


def exponent(value: Any) -> str:
    """'3e−4': for learning rates."""
    if not is_number(value):
        return fixed(value, 0)
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}".replace("-", "−")


def percent(value: Any, decimals: int = 1) -> str:
    """A share in [0, 1] as '12.3 %'."""
    return f"{100 * value:.{decimals}f}{SPACE}%".replace("-", "−") if is_number(value) else fixed(value, 0)


def interval(bounds: Any, decimals: int, signed: bool = False) -> str:
    """'[1.4213, 1.4310]'; a dash if there is none."""
    if not bounds or any(bound is None for bound in bounds):
        return DASH
    return f"[{f',{SPACE}'.join(fixed(bound, decimals, signed) for bound in bounds)}]"


def p_value(value: Any) -> str:
    """'0.012', or '< 0.001'."""
    return f"<{SPACE}0.001" if is_number(value) and value < 0.001 else fixed(value, 3)


def duration(seconds: Any) -> str:
    """'45 s', '12 min 5 s' or '3 h 20 min'."""
    if not is_number(seconds):
        return fixed(seconds, 0)
    if seconds < 100:
        return f"{seconds:.3g}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes}{SPACE}min {rest}{SPACE}s" if minutes < 100 else f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"
    )
