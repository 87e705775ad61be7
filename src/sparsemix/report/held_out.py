"""How much of the held-out text stands in the training text, in words."""

from collections.abc import Mapping
from typing import Any

from sparsemix.report.numbers import percent


def found_in_train(measured: Mapping[str, Any] | None) -> str:
    """What a text's manifest says of it as `contamination`; that it is unknown for texts of earlier versions."""
    if not measured:
        return "how much of the held-out text stands in the training text was not measured"
    return (
        f"{percent(measured['test'])} of the test split's windows of {measured['window']} tokens stand word for word "
        f"in the training text (validation {percent(measured['validation'])})"
    )
