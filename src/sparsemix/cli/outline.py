"""The settings of a run without the code that they configure: the same classes and rules, read from the same sources,
with no torch. A slip of the finger is then answered in the time that torch alone takes to load."""

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import sparsemix
from sparsemix.config import Config

ROOT = Path(sparsemix.__file__).parent
# Where settings are defined, and what else their rules use.
SOURCES = (
    "settings",
    "model",
    "machine",
    "data",
    "data/shards",
    "data/files",
    "optim",
    "optim/groups",
    "optim/rates",
    "optim/schedule",
    "layers",
)
# The same of studies, which also ask which kinds and launchers there are.
STUDIES = (
    *("sweep/arms", "sweep/ladder", "sweep/compare", "sweep/isoflop_study", "reproduce/lab"),
    *("sweep/launch/base", "sweep/launch/local", "sweep/launch/ray", "sweep/launch/slurm"),
)
LIGHT = ("collections", "dataclasses", "functools", "math", "pydantic", "re", "typing")
LIGHT_OURS = ("sparsemix.config", "sparsemix.errors", "sparsemix.inputs", "sparsemix.patterns")


def run_config(studies: bool = False) -> type[Config] | None:
    """RunConfig with its rules and costs; None where the sources are not at hand."""
    return outlined("settings", "RunConfig", STUDIES if studies else ())


def outlined(source: str, name: str, also: tuple[str, ...] = ()) -> Any:
    """What a source calls `name`, in outline; `also`: further sources that it uses. None where it is not at hand."""
    known = (*SOURCES, *also)
    beside = source in known or source.startswith("layers/")
    return _modules(known if beside else (*known, source)).get(f"sparsemix.{source.replace('/', '.')}", {}).get(name)


@lru_cache(maxsize=4)
def _modules(sources: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    files = dict(_files(sources))
    modules: dict[str, dict[str, Any]] = {}
    left: list[tuple[str, str, ast.stmt]] = []
    for name, path in files.items():
        # pydantic looks names up in the module that a class says it is of; it must not be the real one.
        modules[name] = {"__name__": f"{name} (outline)", "__builtins__": __builtins__}
        left += [(name, str(path), statement) for statement in _statements(ast.parse(path.read_bytes()))]
    while left:
        again = [entry for entry in left if not _done(*entry, modules)]
        if len(again) == len(left):
            break
        left = again
    return modules


def _files(sources: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for source in sources:
        folder = ROOT / source
        found = [folder / "__init__.py", *sorted(folder.glob("*.py"))] if source == "layers" else []
        for path in found or [folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")]:
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            if path.is_file():
                yield ".".join(part for part in parts if part != "__init__"), path


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """What may define settings, a name at a time."""
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield ast.ImportFrom(statement.module, [alias], 0)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.Import)) or _settings(statement):
            for node in ast.walk(statement):
                # Of functions the types are not asked for, and are of torch.
                if isinstance(node, ast.FunctionDef):
                    node.returns = None
                    for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                        argument.annotation = None
            yield statement


def _settings(statement: ast.stmt) -> bool:
    """Is it a class of settings, or a record that their costs are told in?"""
    if not isinstance(statement, ast.ClassDef):
        return False
    if not statement.bases:
        return any("dataclass" in ast.unparse(decorator) for decorator in statement.decorator_list)
    return any(isinstance(base, ast.Name) and base.id.endswith("Config") for base in statement.bases)


def _done(module: str, file: str, statement: ast.stmt, modules: dict[str, dict[str, Any]]) -> bool:
    """Execute a statement in its module's outline; False where a name in it is not known (yet)."""
    space = modules[module]
    if isinstance(statement, ast.Import):
        if any(alias.name.partition(".")[0] not in LIGHT for alias in statement.names):
            return False
    elif isinstance(statement, ast.ImportFrom):
        source, name = statement.module or "", statement.names[0].name
        if source in modules:
            if name in modules[source]:
                space[statement.names[0].asname or name] = modules[source][name]
            return name in modules[source]
        if source not in LIGHT_OURS and source.partition(".")[0] not in LIGHT:
            return False
    elif isinstance(statement, ast.ClassDef) and statement.bases:
        bases = [space.get(base.id) for base in statement.bases if isinstance(base, ast.Name)]
        if not any(isinstance(base, type) and issubclass(base, Config) for base in bases):
            return False
    try:
        exec(compile(ast.fix_missing_locations(ast.Module([statement], [])), file, "exec"), space)
    except NameError:
        return False
    return True
