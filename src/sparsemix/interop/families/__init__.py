"""Decoders in Hugging Face's layouts: read into the language model here, and written for transformers' own classes."""

from sparsemix.interop.families.read import READERS, Decoder, read_decoder

__all__ = ["READERS", "Decoder", "read_decoder"]
