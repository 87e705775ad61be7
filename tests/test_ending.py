"""Whatever escapes a command is one line and an exit code; what can be refused at once loads no torch."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sparsemix import __version__
from sparsemix.cli import ending
from sparsemix.cli.app import spread_text
from sparsemix.config import ConfigError
from sparsemix.errors import TrainingError


def end(capsys, error: BaseException) -> tuple[int, str]:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        ending.ended(command)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == (1 if said.err else 0)
    return ended.value.code, said.err  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("a=1 must be 2"), 2, "sparsemix: a=1 must be 2\n"),
        (ConfigError("a\nb\n  c"), 2, "sparsemix: a b c\n"),
        (TrainingError("no"), 1, "sparsemix: no\n"),
        (typer.BadParameter("Must be x."), 2, "sparsemix: invalid value: Must be x; `sparsemix --help`"),
        (OSError(errno.EFBIG, "File too large", "/a/b"), 2, "/a/b: File too large; allow larger files (ulimit -f)"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 2, "/a/b: No space left on device; free space"),
        (PermissionError(errno.EACCES, "Permission denied", b"/a\xe9"), 2, "choose another place"),
        (OSError("odd"), 2, "sparsemix: odd\n"),
        (MemoryError(), 2, "out of memory"),
        (typer.Exit(3), 3, ""),
        (ConfigError("x" * 9000), 2, "…\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, says):
    ended, said = end(capsys, error)
    assert ended == code
    assert says in said
    assert len(said) < 5000


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a\nb"), RecursionError(), AssertionError()])
def test_a_fault_of_ours_is_one_line_that_names_the_file_with_its_traceback(capsys, tmp_path, monkeypatch, error):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, said = end(capsys, error)
    assert code == 1
    assert "a fault of sparsemix, not of yours; please report it" in said
    path = Path(re.findall(r"the traceback in (\S+)", said)[0])
    assert path.parent == tmp_path
    assert type(error).__name__ in path.read_text()
    assert "def command" not in said
    assert "in command" in path.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert "this traceback: " in end(capsys, error)[1]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | environment, check=False)


def test_the_version_and_python_m():
    said = subprocess.run([sys.executable, "-m", "sparsemix", "--version"], capture_output=True, check=True).stdout
    assert said.decode() == f"sparsemix {__version__}\n"


def test_a_terminal_without_letters_gets_escapes():
    said = run(
        "from sparsemix.cli import ending; ending.ended(lambda: print('\\u4e2d', '\\udce9'))", PYTHONIOENCODING="ascii"
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, b"\\u4e2d \\udce9\n", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_standard_output_is_one_line_too():
    code = "from sparsemix.cli import ending; ending.ended(lambda: print('x' * 99999))"
    with Path("/dev/full").open("wb") as full:
        said = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False)
    assert said.returncode == 2
    assert said.stderr == b"sparsemix: No space left on device; free space or choose another folder\n"


@pytest.mark.parametrize("way", ["print", "terminal.show"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(way):
    code = f"ended(lambda: [{way}(i) for i in range(9999)])"
    script = f"from sparsemix import terminal; from sparsemix.cli.ending import ended; {code}"
    said = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {sys.executable} -c "{script}" | head -1'], capture_output=True, check=False
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, b"0\n", b"")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train tiny --text a b train.lr=1", "train tiny --text a --text b train.lr=1"),
        ("train tiny --text a b seed=1 c", "train tiny --text a --text b seed=1 --text c"),
        ("compare --text a b model.d_model=96", "compare --text a --text b --set model.d_model=96"),
        ("compare --text a b=c.txt", "compare --text a --text b=c.txt"),
    ],
)
def test_settings_after_text_are_settings(typed, meant):
    assert spread_text(typed.split()) == meant.split()


def test_only_three_files_of_ours_are_imported_before_ctrl_c_is_answered():
    code = "import os, sys; before = set(sys.modules); import sparsemix.cli; print(*sorted(set(sys.modules) - before))"
    env = {**os.environ, "PYTHONPATH": str(Path(ending.__file__).parents[2])}
    loaded = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env=env)
    assert loaded.stdout.split() == ["sparsemix", "sparsemix.auto_classes", "sparsemix.cli"]


@pytest.mark.parametrize(
    ("stop", "moment", "told"),
    [
        ("SIGINT", "sys.meta_path.insert(0, At('sparsemix.cli.app'))", "interrupted; nothing was begun"),
        ("SIGTERM", "sys.meta_path.insert(0, At('typer'))", "terminated; nothing was begun"),
        ("SIGINT", "sys.meta_path.insert(0, At('sparsemix.recipes'))", "interrupted; the same command starts anew"),
        ("SIGTERM", "sys.meta_path.insert(0, At('sparsemix.recipes'))", "terminated; the same command starts anew"),
        ("SIGINT", "atexit.register(At.kill)", "interrupted; the command had ended"),
        ("SIGTERM", "atexit.register(At.kill)", "terminated; the command had ended"),
    ],
)
def test_a_stop_at_any_moment_is_one_line(stop, moment, told):
    ended = run(
        f"""import atexit, os, signal, sys
from sparsemix import cli
class At:
    def __init__(self, name): self.name = name
    def find_spec(self, name, *_): return At.kill() if name == self.name else None
    kill = staticmethod(lambda: os.kill(os.getpid(), signal.{stop}))
{moment}
sys.argv = ["sparsemix", "recipes"]
cli.main()"""
    )
    assert ended.stderr.decode() == f"sparsemix: {told}\n"
    assert ended.returncode == (130 if stop == "SIGINT" else 143)
