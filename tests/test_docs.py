"""Every symbol that a page about a mechanism names is where the page says."""

import ast
import re
from pathlib import Path

import pytest

import sparsemix
from sparsemix.layers import LayerConfig

ROOT = Path(sparsemix.__file__).parent
TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGES = sorted((DOCS / "mechanisms").glob("*.md"))


def symbols(path):
    """Names that a file defines at its top level, and the methods of its classes."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_named_symbol_exists(page):
    # A symbol without a file belongs to the file named before it.
    named = re.findall(r"`([\w/]+\.py)?::([\w.]+)`", page.read_text(encoding="utf-8"))
    assert len(named) >= 5
    file = ""
    for given, symbol in named:
        file = given or file
        path = next((folder / file for folder in (ROOT, TESTS) if (folder / file).is_file()), None)
        assert path is not None, file
        assert symbol in symbols(path), f"{file}::{symbol}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_linked_page_and_test_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).is_file(), target
    for target in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (DOCS.parent / target).is_file(), target


def test_every_mechanism_has_a_page():
    plain = {"attention", "beside", "block", "dense"}
    assert {page.stem for page in PAGES} >= (set(LayerConfig.family or {}) - plain) | {"bitnet"}
