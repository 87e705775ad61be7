"""The command line in this process."""

import sys

import pytest

from sparsemix import cli


def call(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command."""
    monkeypatch.setattr(sys, "argv", ["sparsemix", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code if isinstance(ended.value.code, int) else 0, said.out, said.err
