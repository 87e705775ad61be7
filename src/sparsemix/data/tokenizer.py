"""Text -> token ids, in memory and on disk: a byte-level BPE trained on the corpus, or a pretrained tokenizer."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsemix.config import ConfigError
from sparsemix.inputs import expanded

EOT = "<|endoftext|>"
_EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<eot>", "<|eot_id|>", "<|im_end|>")

# What has no end for so long is cut before it is counted: merging a word takes the square of its length.
_LONGEST_WORD = 256
_TOO_LONG = re.compile(rf"\S{{{_LONGEST_WORD}}}(?=\S)|\s{{{_LONGEST_WORD}}}(?=\s)")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most vocab_size tokens, `<|endoftext|>` being id 0. The same texts give the same one.

    It loses nothing: decode(encode(text)) == text. Little text supports fewer merges and so fewer tokens. Words of more
    than 256 characters are counted in pieces, so that the time is linear in the text whatever it is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return _plain(tokenizer)


def _pieces(text: str) -> Iterator[str]:
    """A text, cut inside of words and of white space that are too long to be counted whole."""
    start = 0
    for found in _TOO_LONG.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer in a tokenizer.json (its path, or that of its folder), or by that name on the Hugging Face Hub.

    Raises ConfigError if it cannot be read or has no end-of-text token."""
    path = expanded(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    local = path.is_file() or path.suffix == ".json"
    # tokenizers reports every failure as a bare Exception.
    try:
        tokenizer = Tokenizer.from_file(str(path)) if local else Tokenizer.from_pretrained(name)
    except Exception as error:
        rule = "must be a readable tokenizer.json, its folder, or a tokenizer on the Hugging Face Hub"
        raise ConfigError(f"tokenizer={name} {rule} ({' '.join(str(error).split())[:200]})") from None
    end_of_text(tokenizer, name)
    return _plain(tokenizer)


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # `<|endoftext|>` written out in a document is text, not a document's end.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: Tokenizer, name: str = "") -> int:
    """The id of the token that ends documents. Raises ConfigError if there is none of the usual names."""
    for token in _EOT_NAMES:
        if (i := tokenizer.token_to_id(token)) is not None:
            return i
    raise ConfigError(f"tokenizer={name} has no end-of-text token; add one of {', '.join(_EOT_NAMES)}")


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """What begins and ends a document, and what fills a batch: a padding token of the usual names, or that one."""
    end = tokenizer.id_to_token(end_of_text(tokenizer))
    assert end is not None
    pad = next((name for name in _PAD_NAMES if tokenizer.token_to_id(name) is not None), end)
    return {"bos_token": end, "eos_token": end, "pad_token": pad}


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the vocabulary size a model needs, also where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Int64[np.ndarray, "V"]:
    """UTF-8 bytes of every id's text, 0 for special tokens. Exact for a byte-level vocabulary, where a character of a
    token's name is a byte; for another it counts what marks spaces and bytes too."""
    held = tokenizer.get_vocab(with_added_tokens=True)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    lengths = np.zeros(vocab_size, np.int64)
    for name, i in held.items():
        lengths[i] = 0 if name in special else len(name) if alphabet.issuperset(name) else len(name.encode())
    return lengths


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int64[np.ndarray, "L"]]:
    """The token ids of each text, without any special token."""
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int64) for e in encoded]


def id_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type that holds the ids: uint16 or uint32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, starts) of `EOT d1 EOT d2 ... EOT` in memory; no further text is read once there are max_tokens."""
    eot = np.array([end_of_text(tokenizer)], np.int64)
    parts, starts = [], [0]
    for text in texts:
        # No token is worth tokenizing a book for: this many characters hold enough tokens.
        (ids,) = encode_batch(tokenizer, [text[: 64 * max_tokens]])
        parts += [eot, ids]
        starts.append(starts[-1] + 1 + len(ids))
        if starts[-1] >= max_tokens:
            break
    return np.concatenate([*parts, eot]), np.array(starts, np.int64)


def start_ids(tokenizer: Tokenizer, name: str = "") -> list[int]:
    """What stands before a text that a model is to continue: the tokenizer's own start tokens, or else the end-of-text
    token, which in `write_stream` is before every document. Raises ConfigError if it has neither."""
    encoded = tokenizer.encode("a", add_special_tokens=True)
    own = [i for i, special in zip(encoded.ids, encoded.special_tokens_mask, strict=True) if special]
    leading = own[: encoded.special_tokens_mask.index(0)]
    return leading or [end_of_text(tokenizer, name)]
