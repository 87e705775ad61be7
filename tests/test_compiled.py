"""What torch.compile makes of the layers, in a process of its own: checked signatures cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path


def test_layers_compile_into_one_graph_and_stay_equal():
    folder = Path(__file__).parent / "compiled"
    command = [sys.executable, "-m", "pytest", "-q", str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "SPARSEMIX_UNCHECKED_TYPES": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout or "100%" in done.stdout
