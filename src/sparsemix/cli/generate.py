"""`sparsemix generate`: text from a trained model, token by token, and how each token was routed."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparsemix.cli.early import refuse_misfit, trained_folder
from sparsemix.cli.output import interruptible
from sparsemix.errors import ConfigError
from sparsemix.inputs import tried
from sparsemix.terminal import say


def generate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a saved model's.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text; - is standard input.")] = None,
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
    # Before torch is loaded: what is wrong with the words is said at once.
    text = read_prompt(prompt, prompt_file)
    page = html or (model / "generation.html" if show else None)
    trained_folder(model)
    if page is not None:
        tried(page, "html")
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    refuse_misfit("generation", "Sampling", given)

    from sparsemix.config import parse
    from sparsemix.data import Tally
    from sparsemix.durable import write_atomic
    from sparsemix.generation import Sampling
    from sparsemix.play import Play
    from sparsemix.report.generation_page import generation_page

    if prompt_file is not None:
        say(Tally.of(text).line())
    sampling = parse(Sampling, given)
    with interruptible("what was printed is all there is"):
        play = Play(model, text, max_tokens, sampling, page is not None)
        _stream(play, show is not None)
        say(play.summary())
        if page is not None:
            write_atomic(page, generation_page(play.record()))
            say(f"page: {page}")


def read_prompt(prompt: str | None, path: Path | None) -> str:
    """The text of --prompt or --prompt-file, or of standard input if neither is given or the file is `-`. Raises
    ConfigError."""
    if prompt is not None and path is not None:
        raise ConfigError("give either --prompt or --prompt-file")
    if prompt is not None:
        # Bytes that are not UTF-8 reach Python as halves of letters.
        name, held = "prompt", prompt.encode("utf-8", "surrogateescape" if _from_bytes(prompt) else "surrogatepass")
    elif path is None or str(path) == "-":
        if sys.stdin is None or (path is None and sys.stdin.isatty()):
            raise ConfigError("give --prompt or --prompt-file, or write the text into standard input: ... | sparsemix")
        # The last line's end is the pipe's, as in $(...).
        name, held = "standard input", sys.stdin.buffer.read().removesuffix(b"\n")
    elif not path.is_file():
        raise ConfigError(f"prompt-file={path}: no such file")
    else:
        name, held = f"prompt-file={path}", path.read_bytes()
    try:
        return held.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 at byte {error.start}; convert it") from None


def _from_bytes(text: str) -> bool:
    return all(not "\ud800" <= letter <= "\udfff" or "\udc80" <= letter <= "\udcff" for letter in text)


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
