"""A model's tokenizer as Hugging Face's own kind."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import AutoTokenizer

from sparsemix.data.tokenizer import end_of_text
from sparsemix.interop.hf_config import SparsemixConfig

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|endofpad|>", "<pad_token>")


def wrap_tokenizer(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The same ids for the same text. A document begins and ends with one token, and padding, which is on the left, has
    the tokenizer's own token or that one."""
    end = tokenizer.id_to_token(end_of_text(tokenizer))
    pad = next((name for name in PAD_NAMES if tokenizer.token_to_id(name) is not None), end)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        model_max_length=max_length,
        # `<|endoftext|>` written out in a text is text, as it was in training.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


AutoTokenizer.register(SparsemixConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
