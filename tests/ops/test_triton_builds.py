import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from sparsemix import ops

SCRIPT = Path(__file__).with_name("compile_for_hopper.py")


def kernels():
    """folder.function of every Triton kernel that is launched: `name[grid](...)`."""
    for path in Path(ops.__file__).parent.glob("*/triton.py"):
        text = path.read_text(encoding="utf-8")
        launched = {name for pair in re.findall(r"(\w+)\[|_launch\((\w+)", text) for name in pair}
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name in launched:
                yield f"{path.parent.name}.{node.name}"


def test_every_triton_kernel_compiles_for_a_gpu():
    # The checks of this process cannot be compiled.
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=os.environ, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert set(ran.stdout.split()) == set(kernels())
