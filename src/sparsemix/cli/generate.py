"""`sparsemix generate`: text from a trained model, token by token, and how each token was routed."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparsemix.cli.output import interruptible
from sparsemix.errors import ConfigError
from sparsemix.terminal import say


def generate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a saved model's.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text to continue.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many new tokens.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the likeliest K tokens only.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens that hold this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    show: Annotated[
        Literal["routing"] | None,
        typer.Option(help="Colour every token by how many blocks processed it, and write the page."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Where the page goes; default: MODEL/generation.html.")] = None,
) -> None:
    """Continue a text with a trained model, token by token."""
    from sparsemix.config import parse
    from sparsemix.durable import write_atomic
    from sparsemix.generation import Sampling
    from sparsemix.play import Play
    from sparsemix.report.generation_page import generation_page

    text = read_prompt(prompt, prompt_file)
    sampling = parse(Sampling, {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed})
    page = html or (model / "generation.html" if show else None)
    with interruptible("what was printed is all there is"):
        play = Play(model, text, max_tokens, sampling, page is not None)
        if page is not None:
            check_writable(page)
        try:
            _stream(play, show is not None)
        except BrokenPipeError:
            # The reader, such as `head`, has seen enough; Python must not flush the rest into the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        say(play.summary())
        if page is not None:
            write_atomic(page, generation_page(play.record()))
            say(f"page: {page}")


def read_prompt(prompt: str | None, path: Path | None) -> str:
    """The text of --prompt or --prompt-file. Raises ConfigError."""
    if (prompt is None) == (path is None):
        raise ConfigError("give either --prompt or --prompt-file")
    if path is None:
        return prompt or ""
    if not path.is_file():
        raise ConfigError(f"prompt-file={path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt-file={path} is not UTF-8 at byte {error.start}; convert it") from None


def check_writable(page: Path) -> None:
    """Raises ConfigError before any work is done for a page that could not be written."""
    if page.is_dir():
        raise ConfigError(f"html={page} is a folder; name a file")
    if not page.parent.is_dir():
        raise ConfigError(f"html={page}: there is no folder {page.parent}; make it or choose another place")
    try:
        # Only trying tells: rights, read-only disks and folders of the system.
        with tempfile.TemporaryFile(dir=page.parent):
            pass
    except OSError as error:
        where = f"html={page}: the folder {page.parent} cannot be written ({error.strerror})"
        raise ConfigError(f"{where}; choose another place with --html") from None


def _stream(play: Any, coloured: bool) -> None:
    from rich.console import Console

    from sparsemix.report.generation_text import Painter

    painter = Painter(Console(), *play.depths)
    if coloured:
        # It has its colours already, which `say` would not keep.
        print(painter.legend(), file=sys.stderr, flush=True)
    try:
        for token in play.tokens():
            text, blocks = token["text"], token.get("blocks")
            shown = painter.token(text, blocks, token["prompt"]) if coloured else painter.plain(text)
            print(shown, end="", flush=True)
        print(painter.plain(play.rest()), end="", flush=True)
    finally:
        print(flush=True)
