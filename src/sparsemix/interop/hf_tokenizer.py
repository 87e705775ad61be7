"""A model's tokenizer as Hugging Face's own kind."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import AutoTokenizer

from sparsemix.interop.hf_config import SparsemixConfig
from sparsemix.saved import tokenizer_settings


def wrap_tokenizer(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The same ids for the same text. A document begins and ends with one token, and padding, which is on the left, has
    the tokenizer's own token or that one."""
    settings = tokenizer_settings(tokenizer, max_length)
    settings.pop("tokenizer_class")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **settings)


AutoTokenizer.register(SparsemixConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
