"""Hugging Face's classes for sparsemix models. Importing them registers them; after `import sparsemix`, so does the
import of an Auto class."""

from sparsemix.interop.hf_cache import SparsemixCache
from sparsemix.interop.hf_config import SparsemixConfig
from sparsemix.interop.hf_headless import SparsemixModel
from sparsemix.interop.hf_model import SparsemixForCausalLM
from sparsemix.interop.hf_tokenizer import wrap_tokenizer

__all__ = ["SparsemixCache", "SparsemixConfig", "SparsemixForCausalLM", "SparsemixModel", "wrap_tokenizer"]
