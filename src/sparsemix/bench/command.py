"""`sparsemix bench`. Heavy imports are inside: the command line answers at once."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def bench(
    only: Annotated[list[str] | None, typer.Option("--only", help="Works to run; repeatable. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds: a trial, not a result.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON to write or add to; default: bench/results/DATE.json.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; default: one per core.", min=1)] = None,
    page: Annotated[Path | None, typer.Option(help="Only write docs/performance.md from this JSON.")] = None,
    names: Annotated[bool, typer.Option("--list", help="List the works.")] = False,
) -> None:
    """Measure what is ours beside every peer that is installed, and check the floors."""
    from datetime import UTC, datetime

    from rich.console import Console

    from sparsemix.bench import harness
    from sparsemix.bench.tables import console_tables

    console = Console() if sys.stdout.isatty() else Console(width=180)
    if page is not None:
        from sparsemix.bench.page import write_page

        print(f"page: {write_page(page)}")
        return
    from sparsemix.bench.works import WORKS

    if names:
        for name, work in WORKS.items():
            print(f"{name:18} {work.about}")
        return
    chosen, now = harness.chosen(only or [], list(WORKS)), datetime.now(UTC)
    file = out or harness.default_path(now)
    count = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or os.cpu_count()
    command = shlex.join(["sparsemix", *sys.argv[1:]])
    result = harness.continued(file, harness.about(command, count or 1, quick, now))
    stopped = False
    with Console(stderr=True).status("bench") as status:
        try:
            harness.run(chosen, result, count or 1, status.update, file)
        except KeyboardInterrupt:
            stopped = True
    console.print(console_tables(result))
    print(f"written: {file}")
    for line in harness.broken(result):
        print(f"sparsemix: {line}", file=sys.stderr)
    if stopped:
        print("sparsemix: interrupted; what was measured is written", file=sys.stderr)
    if stopped or harness.broken(result):
        sys.exit(130 if stopped else 1)
