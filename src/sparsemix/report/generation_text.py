"""A text in a terminal, every token coloured by the number of blocks that processed it; without colours, numbered."""

import unicodedata

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from sparsemix.report.shades import TERMINAL, shade

# Fewer than 256 colours cannot tell the shades apart.
SYSTEMS = {"256": ColorSystem.EIGHT_BIT, "truecolor": ColorSystem.TRUECOLOR}


class Painter:
    """Writes tokens as text for one console. `least` blocks process every token, `most` is all of them."""

    def __init__(self, console: Console, least: int, most: int) -> None:
        self.least, self.most = least, most
        self.system = None if console.no_color else SYSTEMS.get(console.color_system or "")
        self.terminal = console.is_terminal
        self.last: int | None = None

    def legend(self) -> str:
        """What the colours, or the numbers, mean."""
        if self.least == self.most:
            return f"every token passes all {self.most} blocks: no block is routed"
        if self.system is None:
            return f"[n] before a token: n of {self.most} blocks processed it and those after it, up to the next number"
        levels = "".join(self._coloured(f" {n} ", n, "") for n in range(self.least, self.most + 1))
        return f"blocks that processed a token, of {self.most}: {levels}; underlined: the prompt"

    def token(self, text: str, blocks: int, prompt: bool) -> str:
        """A token's piece of text, coloured or numbered."""
        text = self.plain(text)
        if self.system is not None:
            lines = text.split("\n")
            return "\n".join(self._coloured(line, blocks, "underline" if prompt else "") for line in lines)
        mark = "" if blocks == self.last or self.least == self.most or not text else f"[{blocks}]"
        self.last = blocks if text else self.last
        return mark + text

    def plain(self, text: str) -> str:
        """Text as it is for a file; for a terminal, without characters that would command it."""
        if not self.terminal:
            return text
        return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)

    def _coloured(self, text: str, blocks: int, more: str) -> str:
        if self.least < blocks and text:
            ground, ink = shade((blocks - self.least) / (self.most - self.least), TERMINAL)
            more = f"{more} {ink} on {ground}"
        return Style.parse(more.strip() or "none").render(text, color_system=self.system)
