"""`sparsemix export`. Heavy imports are inside: the command line answers at once."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemix.cli.early import trained_folder
from sparsemix.cli.output import interruptible
from sparsemix.inputs import refuse_used, tried


def export(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a model's.")],
    to: Annotated[Path, typer.Option(help="The new folder.")],
    layout: Annotated[
        str,
        typer.Option(help="sparsemix, which holds every model, or a class of transformers: llama, mixtral, olmoe, ..."),
    ] = "sparsemix",
) -> None:
    """Write a trained model for Hugging Face's tools: weights, tokenizer, generation settings, model card."""
    trained_folder(model)
    refuse_used(to)
    tried(to, "to", folder=True)

    from transformers.utils.logging import disable_progress_bar

    from sparsemix.interop.export import export as write

    disable_progress_bar()
    with interruptible("nothing is half-written; the same command starts anew"):
        write(model, to, layout)
    print(f"exported: {to}")
