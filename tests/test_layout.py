"""A file imports lower floors and its own folder; the heavy libraries stay at the top."""

import ast
from pathlib import Path

import pytest

import sparsemix

ROOT = Path(sparsemix.__file__).parent
# From the ground up: a file imports only from the lines before its own, and from its own folder.
LADDER = (
    ("errors", "auto_classes", "commit", "signals", "durable", "terminal"),
    ("inputs", "provenance"),
    ("config",),
    ("patterns",),
    ("run",),
    ("ops",),
    ("layers",),
    ("model", "optim", "data", "machine"),
    ("evaluate", "generation", "checkpoint", "step"),
    ("saved",),
    ("settings",),
    ("memory",),
    ("train", "parallel"),
    ("trained",),
    ("api",),
    ("report", "interop", "recipes"),
    ("sweep", "inspection", "play", "doctor", "track"),
    ("reproduce",),
    ("bench",),
    ("cli",),
)
FLOORS = {name: floor for floor, names in enumerate(LADDER) for name in names}
TOP_ONLY = {"transformers", "datasets", "lm_eval", "ray", "matplotlib", "submitit", "tensorboard", "wandb", "trackio"}
# Documents come from the hub through `datasets`, imported only when one is asked for.
LAZY = {("data/hub.py", "datasets")}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem not in ("__init__", "__main__"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def place(path):
    """The floor's name: the folder or file directly under the package."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """(module, is it at the top level of the file) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "sparsemix" else [base]
            yield from ((name, id(node) in top) for name in names)


@each_file
def test_a_file_imports_lower_floors_and_its_own_folder(path):
    mine = place(path)
    assert mine in FLOORS, f"give {mine} a floor"
    for module, _ in imports(path):
        package, _, rest = module.partition(".")
        if package != "sparsemix":
            continue
        other = rest.partition(".")[0]
        if other in ("", "__version__"):
            continue
        assert other in FLOORS, f"give {other} a floor"
        assert other == mine or FLOORS[other] < FLOORS[mine], f"{module} from {mine}"


@each_file
def test_heavy_libraries_are_imported_on_the_top_floors_only(path):
    name = path.relative_to(ROOT).as_posix()
    for module, at_the_top in imports(path):
        library = module.partition(".")[0]
        if library in TOP_ONLY and FLOORS[place(path)] < FLOORS["report"]:
            assert (name, library) in LAZY
            assert not at_the_top


@each_file
def test_reports_settings_and_run_folders_need_no_torch(path):
    if place(path) in ("report", "config", "inputs", "errors", "run"):
        assert not [module for module, _ in imports(path) if module.partition(".")[0] == "torch"]


@each_file
def test_the_command_line_answers_before_heavy_imports(path):
    heavy = TOP_ONLY | {"torch"}
    if place(path) == "cli":
        assert not [module for module, top in imports(path) if top and module.partition(".")[0] in heavy]


@each_file
def test_a_source_file_fits_on_three_hundred_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
