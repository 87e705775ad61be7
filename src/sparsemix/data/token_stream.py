"""Texts -> token ids on disk, `EOT d1 EOT d2 ... EOT`: every word is encoded once."""

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer

from sparsemix.data.shingles import pieces
from sparsemix.data.tokenizer import encode_batch, end_of_text, id_dtype, num_ids, train_tokenizer

# Words that are remembered, at most, and the longest of them in characters.
_WORDS, _LONGEST = 1 << 19, 256
# A tokenizer takes some 50 times the memory of a text: longer stretches without a place to break are cut.
_STRETCH = 1 << 16

# White space as Unicode and the byte-level pre-tokenizer have it.
_SPACE = r"\t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# A run ends here only if what follows is plain ASCII: another letter or sign would go on with it.
_ENDS = r"(?![^\t-\r -~])"
# Stretches between which the byte-level pre-tokenizer (GPT-2's pattern) always breaks, most of them its words.
_STRETCHES = re.compile(
    rf" ?[A-Za-z]++{_ENDS}"
    r"|'(?:[stmd]|re|ve|ll)"
    rf"| ?[!-/:-@\[-`{{-~]++{_ENDS}"
    rf"| ?[0-9]++{_ENDS}"
    # White space before white space or the end; then one such sign that joins no word; then all up to the next one.
    rf"|[{_SPACE} ]+(?![^{_SPACE} ])"
    rf"|[{_SPACE}](?=[^{_SPACE} ])"
    rf"| ?[^{_SPACE} ]+"
)


class _Words(dict[str, bytes]):
    """Stretch -> the bytes of its ids, encoded when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._encode, self._dtype = tokenizer.encode, id_dtype(num_ids(tokenizer))

    def __missing__(self, stretch: str) -> bytes:
        parts = (stretch[i : i + _STRETCH] for i in range(0, len(stretch), _STRETCH))
        ids = b"".join(np.array(self._encode(p, add_special_tokens=False).ids, self._dtype).tobytes() for p in parts)
        if len(stretch) <= _LONGEST:
            if len(self) >= _WORDS:
                self.clear()
            self[stretch] = ids
        return ids


def write_stream(
    tokenizer: Tokenizer, texts: Iterable[str], path: Path, on_text: Callable[[str], None] | None = None
) -> Int64[np.ndarray, "starts"]:
    """Writes `EOT d1 EOT d2 ... EOT` as raw ids; returns each document's first index, then that of the final EOT.

    Our own tokenizer gets each word once, which is several times as fast and gives the ids that it gives for the whole
    text. Stretches of more than 65,536 characters without white space are cut (as is, for another tokenizer, every
    text of more than 1,048,576 characters). on_text gets each text after it was written."""
    eot = np.array([end_of_text(tokenizer)], id_dtype(num_ids(tokenizer))).tobytes()
    starts, words, own = [0], _Words(tokenizer), is_own(tokenizer)
    with path.open("wb") as file:
        for text in texts:
            file.write(eot)
            ids = _own(words, text) if own else _other(tokenizer, text)
            size = sum(file.write(part) for part in ids)
            starts.append(starts[-1] + 1 + size // len(eot))
            if on_text:
                on_text(text)
        file.write(eot)
    return np.array(starts, np.int64)


def _own(words: _Words, text: str) -> Iterable[bytes]:
    # A piece begins with the white space before its first word, so that the words stay what they are.
    return (b"".join(map(words.__getitem__, _STRETCHES.findall(piece))) for piece in pieces(text, 1 << 20))


def _other(tokenizer: Tokenizer, text: str) -> Iterable[bytes]:
    dtype = id_dtype(num_ids(tokenizer))
    return (encode_batch(tokenizer, [piece])[0].astype(dtype).tobytes() for piece in pieces(text, 1 << 20))


def is_own(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer breaks text as those do that `train_tokenizer` makes."""
    made = json.loads(tokenizer.to_str())
    return all(made.get(part) == _ours()[part] for part in ("normalizer", "pre_tokenizer", "post_processor")) and all(
        token["special"] for token in made["added_tokens"]
    )


@functools.cache
def _ours() -> dict[str, Any]:
    return json.loads(train_tokenizer((), 257).to_str())
