"""`sparsemix clean`. Reads folders only: no torch."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemix.cli.output import interruptible


def clean(
    folders: Annotated[list[Path], typer.Argument(help="Folders that hold runs, however deep.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Free what finished runs need no more: their optimizer state, and what killed commands left half-written."""
    from sparsemix.report.numbers import si
    from sparsemix.sweep.clean import clean as free

    count = total = 0
    with interruptible("what was said is gone, the rest stays"):
        for folder in folders:
            for freed in free(folder, dry_run):
                count, total = count + 1, total + freed.bytes
                print(f"{freed.path}: {si(freed.bytes, 'B')}, {freed.why}")
    said = "would be freed; without --dry-run it is" if dry_run else "freed"
    print(f"{si(total, 'B')} in {count} places {said}" if count else "nothing to free")
