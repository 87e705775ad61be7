"""Decoders in Hugging Face's layouts: read into the language model here, and written for transformers' own classes."""

from sparsemix.interop.families.layouts import LAYOUTS
from sparsemix.interop.families.read import READERS, Decoder, read_config, read_decoder
from sparsemix.interop.families.write import families_of, write_decoder

__all__ = ["LAYOUTS", "READERS", "Decoder", "families_of", "read_config", "read_decoder", "write_decoder"]
