"""Shapes and types of every annotated signature are checked where a test calls it (but see `unchecked`); one thread,
one seed.

The checks cannot be compiled, so `compiled/` runs in a process without them (test_compiled.py)."""

import os

import pytest
from jaxtyping import install_import_hook

# GPU kernels are interpreted; Triton reads this when it decorates a kernel.
os.environ.setdefault("TRITON_INTERPRET", "1")
CHECKED = os.environ.get("SPARSEMIX_UNCHECKED_TYPES") != "1"
collect_ignore = ["compiled"] if CHECKED else []

HOOKED = ["layers", "ops", "data", "evaluate", "model", "generation"]
# The numeric tower lets an int stand where a float is annotated.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
if CHECKED:
    install_import_hook([f"sparsemix.{name}" for name in HOOKED], CHECKER)

import torch  # noqa: E402  (after the hook)

from tiny import unchecked_shapes  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def unchecked():
    """No checks of shapes, which take two thirds of a small model's time: for modules whose claims are about whole
    models, as every layer and operation is checked in tests of its own."""
    with unchecked_shapes():
        yield


@pytest.fixture
def checked():
    """The checks, for what such a module alone calls."""
    with unchecked_shapes(False):
        yield


# A minute or two each. Begun last, they would leave the other workers idle.
LONGEST = ("test_compiled.py", "test_fuzz.py", "test_operands.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
