"""The colours of pages and figures by name: `ground`, `ink`, ..., and c0 to c7 of lines (Okabe and Ito's, which eyes
of every kind tell apart; the yellow is darker on white)."""

LIGHT = {
    "ground": "#ffffff", "ink": "#1a1a1a", "soft": "#595959", "rule": "#d4d4d4", "faint": "#ebebeb",
    "tint": "#f6f6f4", "link": "#00558a",
    "c0": "#1a1a1a", "c1": "#0072b2", "c2": "#d55e00", "c3": "#009e73", "c4": "#cc79a7", "c5": "#e69f00",
    "c6": "#56b4e9", "c7": "#a89a00",
}  # fmt: skip
DARK = {
    "ground": "#16181b", "ink": "#e6e4df", "soft": "#a6a49e", "rule": "#43464b", "faint": "#2a2d31",
    "tint": "#1d2024", "link": "#8cc4ee",
    "c0": "#e6e4df", "c1": "#4a9fdc", "c2": "#f0803c", "c3": "#2fbf94", "c4": "#dd94bb", "c5": "#eeb22f",
    "c6": "#8fd0f7", "c7": "#f0e442",
}  # fmt: skip


def declarations(colours: dict[str, str]) -> str:
    """The colours as CSS variables."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
