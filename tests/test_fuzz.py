"""A minute of inputs gone wrong: settings, recipes, options, texts, run folders, model folders, prompts.

SPARSEMIX_FUZZ_S and SPARSEMIX_FUZZ_SEED ask for a longer and for another one."""

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "fuzzing"


def test_whatever_is_asked_ends_in_time_with_one_line_and_an_exit_code():
    seconds, seed = os.environ.get("SPARSEMIX_FUZZ_S", "60"), os.environ.get("SPARSEMIX_FUZZ_SEED", "0")
    ended = subprocess.run(
        [sys.executable, str(FUZZ), "--seconds", seconds, "--seed", seed], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr[-2000:]}"
    assert int(ended.stderr.split()[0]) >= 20, "too few cases to say anything"
