"""`sparsemix status`. Reads folders only: no torch."""

import time
from pathlib import Path
from typing import Annotated

import typer

from sparsemix.cli.output import interruptible
from sparsemix.terminal import notes, say, show

LOOK_EVERY_S = 2.0
PLAIN_EVERY_S = 20.0


def status(
    folder: Annotated[Path, typer.Argument(help="A folder of runs: a study's, a comparison's, or one run's.")],
    watch: Annotated[bool, typer.Option("--watch", help="Keep looking until all have ended.")] = False,
) -> None:
    """Show where the runs of a folder stand: done, running, failed, stopped or waiting."""
    from sparsemix.sweep.phase import phase_of
    from sparsemix.sweep.status import Board, cells_of, table, totals

    if watch:
        with interruptible("the runs go on"):
            _follow(folder)
    runs = Board(cells_of(folder)).look()
    show(table(runs))
    print(totals(runs, phase_of(folder)))


def _follow(folder: Path) -> None:
    """Until nothing runs and nothing waits: the table on a terminal, elsewhere a line now and then."""
    from rich.console import Group
    from rich.live import Live

    from sparsemix.sweep.phase import phase_of
    from sparsemix.sweep.status import Board, cells_of, table, totals

    screen = notes()
    said_at = float("-inf")
    board = Board(cells_of(folder))
    with Live(console=screen, transient=True, auto_refresh=False) as live:
        while True:
            board.cells = cells_of(folder)
            runs = board.look()
            phase = phase_of(folder)
            if phase is None and not any(run.state in ("running", "waiting") for run in runs):
                return
            if screen.is_terminal:
                live.update(Group(totals(runs, phase), table(runs, max(3, screen.height - 4))), refresh=True)
            elif time.monotonic() - said_at > PLAIN_EVERY_S:
                said_at = time.monotonic()
                say(totals(runs, phase))
            time.sleep(LOOK_EVERY_S)
