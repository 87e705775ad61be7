import sys

import pytest

from sparsemix import cli
from sparsemix.cli.options import text_settings


@pytest.mark.parametrize(
    "command",
    [
        ("train", "tiny", "train.budget_flops=1e12"),
        ("compare", "--kinds", "dense", "--budget", "1e12"),
        ("isoflop", "--kinds", "dense", "--budgets", "1e12"),
        ("reproduce", "peer-table2"),
    ],
)
def test_every_command_that_prepares_text_takes_a_split(command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["sparsemix", *command, "--out", str(out), "--split", "sideways"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "split" in said and "sideways" in said and "folder" in said
    assert not out.exists()


def test_without_the_option_the_settings_stay_what_they_were():
    assert text_settings(None, None) == ()
    assert text_settings([".asc"], "time") == ('data.text_as=[".asc"]', "data.split=time")
