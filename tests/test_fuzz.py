"""A minute of inputs gone wrong: settings, recipes, options, texts, run folders, model folders, prompts.

SPARSEMIX_FUZZ_S and SPARSEMIX_FUZZ_SEED ask for a longer and for another one."""

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "fuzzing"


def test_whatever_is_asked_ends_in_time_with_one_line_and_an_exit_code(tmp_path):
    seconds, seed = os.environ.get("SPARSEMIX_FUZZ_S", "60"), os.environ.get("SPARSEMIX_FUZZ_SEED", "0")
    ended = subprocess.run(
        [sys.executable, str(FUZZ), "--seconds", seconds, "--seed", seed],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not list(tmp_path.iterdir()), "what is asked for writes where it was called from"
    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr[-2000:]}"
    assert int(ended.stderr.split()[0]) >= 20, "too few cases to say anything"
