"""Options that several commands have."""

from typing import Annotated

import typer

Text = Annotated[
    list[str] | None, typer.Option("--text", help="Files, folders, globs, hf:NAME:SPLIT, or stdlib; one or more.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting, such as model.d_model=96. Repeatable.")]
