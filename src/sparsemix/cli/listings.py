"""`sparsemix recipes`, `kinds`, `parity` and `doctor`: what there is. Heavy imports are inside."""

from typing import Annotated

import typer

from sparsemix.cli.early import refuse_kind, refuse_sizes
from sparsemix.terminal import show


def recipes() -> None:
    """List the packaged recipes."""
    from rich.table import Table

    from sparsemix.recipes import FOLDER, purpose, sizes_of
    from sparsemix.recipes import recipes as packaged

    table = Table("recipe", box=None, pad_edge=False)
    table.add_column("what it is", overflow="fold")
    table.add_column("sizes, as NAME:SIZE; the first if none is named")
    for name, path in packaged().items():
        table.add_row(name, purpose(path), " ".join(sizes_of(name)))
    show(table)
    print(f"files: {FOLDER}")


def kinds(
    kind: Annotated[str | None, typer.Argument(help="Show this kind alone.")] = None,
    d_model: Annotated[int, typer.Option(help="Model width at which costs are given.", min=16)] = 256,
    seq_len: Annotated[int, typer.Option(help="Sequence length at which costs are given.", min=1)] = 256,
) -> None:
    """List the kinds of layers with their settings and what an example of each costs."""
    refuse_kind(kind)

    from sparsemix.sweep.kinds import described

    show(described(kind, d_model, seq_len))


def parity(
    d_model: Annotated[int, typer.Option(help="Model width.")] = 768,
    d_ff: Annotated[int, typer.Option(help="Width of the experts to match.")] = 2048,
    experts: Annotated[int, typer.Option(help="How many there are.")] = 8,
    top_k: Annotated[int, typer.Option(help="How many of them a token uses.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads of the multi-head layer.")] = 2,
    heads_top_k: Annotated[int | None, typer.Option(help="Experts a sub-token uses; default: as heads.")] = None,
    gated: Annotated[bool, typer.Option("--gated/--plain", help="Three matrices an expert, or two.")] = True,
    multiple_of: Annotated[int, typer.Option(help="Round the number of experts to a multiple of this.")] = 8,
    timed: Annotated[bool, typer.Option("--time", help="Also measure both: equal FLOPs are not equal time.")] = False,
) -> None:
    """Size a multi-head mixture of experts at the FLOPs and parameters of an ordinary one."""
    sizes = (d_model, d_ff, experts, top_k, heads, heads_top_k, gated, multiple_of)
    refuse_sizes(*sizes)

    from sparsemix.layers.parity import parity as at_parity
    from sparsemix.sweep.parity import parity_tables, seconds_per_token, sparse_settings

    found = at_parity(*sizes)
    sparse = sparse_settings(experts, top_k, d_ff, found.activation)
    both = {"moe": sparse, "mh_moe": found.settings()}
    show(parity_tables(found, sparse, seconds_per_token(both, d_model) if timed else None))


def doctor() -> None:
    """Say what this machine can run, which kernels it uses, and what would make it faster."""
    from rich.table import Table

    from sparsemix.doctor import examine

    table = Table("what", "found", box=None, pad_edge=False)
    table.add_column("advice", overflow="fold", style="yellow")
    for finding in examine():
        table.add_row(*finding)
    show(table)
