"""How much of the held-out text stands in the training text, in words."""

from collections.abc import Mapping
from typing import Any

from sparsemix.report.numbers import DASH, percent


def found_in_train(measured: Mapping[str, Any] | None) -> str:
    """What a text's manifest says of it as `contamination`; that it is unknown for texts of earlier versions."""
    if not measured:
        return "how much of the held-out text stands in the training text was not measured"
    test, validation = (percent(measured.get(split)) for split in ("test", "validation"))
    return (
        f"{test} of the test split's windows of {measured.get('window', DASH)} tokens stand word for word in the "
        f"training text (validation {validation})"
    )
