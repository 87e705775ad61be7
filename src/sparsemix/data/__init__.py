"""Text -> documents -> token shards -> batches with an exact cursor."""

from sparsemix.data.documents import read_documents
from sparsemix.data.parts import Parts
from sparsemix.data.preparation import prepare
from sparsemix.data.shards import DataConfig, Shards
from sparsemix.data.tally import Tally, read_line
from sparsemix.data.windows import Batch

__all__ = ["Batch", "DataConfig", "Parts", "Shards", "Tally", "prepare", "read_documents", "read_line"]
