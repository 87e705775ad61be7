"""Text -> documents -> token shards -> batches with an exact cursor."""

from sparsemix.data.corpus import read_documents
from sparsemix.data.shards import Batch, DataConfig, Shards, prepare

__all__ = ["Batch", "DataConfig", "Shards", "prepare", "read_documents"]
