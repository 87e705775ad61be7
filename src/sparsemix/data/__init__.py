"""Text -> documents -> token shards -> batches with an exact cursor.

What is named here is imported when it is first used: where text lies is looked at before anything heavy loads."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsemix.data.documents import read_documents
    from sparsemix.data.parts import Parts
    from sparsemix.data.preparation import prepare
    from sparsemix.data.shards import DataConfig, Shards
    from sparsemix.data.tally import Tally, read_line
    from sparsemix.data.windows import Batch

__all__ = ["Batch", "DataConfig", "Parts", "Shards", "Tally", "prepare", "read_documents", "read_line"]

_FILES = {
    "Batch": "windows",
    "DataConfig": "shards",
    "Parts": "parts",
    "Shards": "shards",
    "Tally": "tally",
    "prepare": "preparation",
    "read_documents": "documents",
    "read_line": "tally",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
