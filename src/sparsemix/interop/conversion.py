"""A model's folder -> the folder of another model, with a receipt."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsemix import saved
from sparsemix.config import ConfigError
from sparsemix.data import Tally, read_documents
from sparsemix.data.tokenizer import encode_stream
from sparsemix.data.windows import Stream
from sparsemix.inputs import expanded, refuse_used
from sparsemix.interop.convert import Converted, convert, observe
from sparsemix.interop.plan import ConvertConfig
from sparsemix.interop.receipt import distance, lines, receipt
from sparsemix.interop.source import BESIDE_TOKENIZER, Source, read_source
from sparsemix.machine import pick_device

Progress = Callable[[str, int, int | None], None]
WINDOW = 256


def convert_folder(
    name: str,
    to: Path,
    settings: ConvertConfig,
    text: Sequence[str] = ("stdlib",),
    tokens: int = 4096,
    progress: Progress = lambda *_: None,
    text_as: Sequence[str] = (),
) -> dict[str, Any]:
    """Convert model `name` (see `read_source`) into the new folder `to`; what comes back is its receipt.json.

    Both models are compared on the first `tokens` tokens of `text`; running statistics of new layers are taken from
    them as well. Written aside and renamed, so `to` is whole or not there. Raises ConfigError."""
    to = expanded(to).resolve()
    refuse_used(to)
    if tokens < 1:
        raise ConfigError(f"tokens={tokens} must be at least 1")
    progress("reading", 0, None)
    source = read_source(name)
    tally = Tally()
    stream = _stream(source, text, tokens, text_as, tally)
    progress("converting", 0, None)
    converted = convert(source.model, settings)
    device = pick_device()
    source.model.to(device)
    converted.model.to(device)
    seq_len = min(source.model.config.seq_len, WINDOW)
    # The logits are the largest tensor: at most 2^24 of each model at a time, or one row.
    rows = max(1, 2**24 // (source.model.config.vocab_size * seq_len))
    observe(converted, stream.eval_batches(rows, seq_len))
    progress("comparing", 0, None)
    measured = distance(source.model, converted.model, stream.eval_batches(rows, seq_len))
    said = receipt(name, source.model, converted, measured, list(text) if source.tokenizer else [])
    said["read"] = tally.line() if source.tokenizer else None
    progress("writing", 0, None)
    _write(to, source, converted, said | {"settings": settings.model_dump(mode="json")})
    return said


def _stream(source: Source, text: Sequence[str], tokens: int, text_as: Sequence[str], tally: Tally) -> Stream:
    """The tokens to compare on, random ones where there is no tokenizer to read text with."""
    if source.tokenizer is None:
        ids = np.random.default_rng(0).integers(source.model.config.vocab_size, size=tokens + 1)
        return Stream(ids, np.array([0, tokens]))
    documents = (document.text for document in read_documents(text, text_as=text_as, tally=tally))
    return Stream(*encode_stream(source.tokenizer, documents, tokens)).first(tokens)


def _write(to: Path, source: Source, converted: Converted, said: dict[str, Any]) -> None:
    with saved.whole(to) as aside:
        saved.write(converted.model.cpu(), aside, source.tokenizer)
        for name in BESIDE_TOKENIZER if source.tokenizer else ():
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, aside / name)
        saved.seal_model(aside)
        (aside / "receipt.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
        (aside / "README.md").write_text(_page(said), encoding="utf-8")


def _page(said: dict[str, Any]) -> str:
    listed = "\n".join(f"- {line}" for line in lines(said))
    return (
        "# A converted model\n\nBy `sparsemix convert`; `receipt.json` holds the same in numbers, and the origin of "
        f"every tensor.\n\n{listed}\n\n`sparsemix train --init-from` trains it on.\n"
    )
