"""What the README shows must work as it stands."""

import re
from pathlib import Path

from sparsemix.data import prepare
from sparsemix.layers import LayerConfig
from sparsemix.train import train
from tiny import run_config, unchecked_shapes, write_corpus

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
LAYER, HUGGING_FACE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_run_as_they_stand():
    names: dict[str, object] = {}
    exec(compile(LAYER, "README.md", "exec"), names)  # the page's own example
    assert names["y"].shape == names["x"].shape  # type: ignore[attr-defined]


def test_a_run_is_a_hugging_face_model_as_it_stands(tmp_path, monkeypatch, capsys):
    data = write_corpus(tmp_path)
    shards = prepare(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with unchecked_shapes():
        train(run_config(data, "mod", steps=6), Path("RUN"), shards)
        exec(compile(HUGGING_FACE, "README.md", "exec"), {})
    assert "The game" in capsys.readouterr().out


def test_every_registered_kind_is_in_the_table_and_no_other():
    table = README.split("## Kinds")[1].split("##")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(LayerConfig.family or {})


def test_every_linked_file_is_there():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target
