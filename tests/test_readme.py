"""What the README shows must work as it stands."""

import re
from pathlib import Path

from sparsemix.layers import LayerConfig

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_as_they_stand():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # the page's own example
    assert names["y"].shape == names["x"].shape  # type: ignore[attr-defined]


def test_every_registered_kind_is_in_the_table_and_no_other():
    table = README.split("## Kinds")[1].split("##")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(LayerConfig.family or {})


def test_every_linked_file_is_there():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target
