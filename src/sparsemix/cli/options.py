"""Options that several commands have."""

import json
from collections.abc import Sequence
from typing import Annotated

import typer

Text = Annotated[
    list[str] | None, typer.Option("--text", help="Files, folders, globs, hf:NAME:SPLIT, or stdlib; one or more.")
]
TextAs = Annotated[
    list[str] | None,
    typer.Option("--text-as", help="A suffix of files to read as text too, such as .asc; `.` for none. Repeatable."),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="What goes to one split together: hash (near-copies; the default), folder, file, or time (the newest are "
        "test).",
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting, such as model.d_model=96. Repeatable.")]

# Where runs are trained; `make_launcher` takes these.
LauncherName = Annotated[
    str,
    typer.Option(
        "--launcher",
        help="Where runs go: local (processes here), ray, or slurm; the last two need --out on a file system that all "
        "their machines share.",
    ),
]
Launch = Annotated[
    list[str] | None,
    typer.Option("--launch", help="A setting of the launcher, such as threads=2 or partition=gpu. Repeatable."),
]
Workers = Annotated[int | None, typer.Option("--workers", help="Runs at a time; default: one per core.", min=1)]
# `sparsemix.track.tracking` takes it.
Track = Annotated[
    str | None,
    typer.Option("--track", help="Also give metrics to tensorboard, wandb (offline) or trackio (local)."),
]


def text_settings(text_as: Sequence[str] | None, split: str | None) -> tuple[str, ...]:
    """--text-as and --split as settings."""
    named = () if not text_as else (f"data.text_as={json.dumps(list(text_as))}",)
    return named if split is None else (*named, f"data.split={split}")
