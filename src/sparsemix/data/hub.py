"""Data sets of the Hugging Face Hub -> rows, streamed."""

import functools
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparsemix.config import ConfigError
from sparsemix.data.files import one_line
from sparsemix.data.rows import Row


def read_hub(source: str) -> Iterator[Row]:
    """The rows of `hf:NAME:SPLIT`, `hf:ORG/NAME:SPLIT` or `hf:[ORG/]NAME/CONFIG:SPLIT`. Raises ConfigError."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    parts, split = hub_parts(source)
    load: Any = functools.partial(load_dataset, split=split, streaming=True)
    with _as_config_error(source):
        try:
            rows = load("/".join(parts[:2]), *parts[2:])
        except DatasetNotFoundError:
            if len(parts) != 2:
                raise
            rows = load(*parts)
        for number, fields in enumerate(rows, 1):
            yield Row(f"{source}:{number}", fields)


def hub_parts(source: str) -> tuple[list[str], str]:
    """([[ORG,] NAME, [CONFIG]], SPLIT) of what `read_hub` takes. Raises ConfigError where it looks otherwise."""
    name, _, split = source.removeprefix("hf:").rpartition(":")
    parts = name.split("/")
    if not split or not all(parts) or len(parts) > 3 or ":" in name:
        raise ConfigError(f"{source} must look like hf:NAME:SPLIT, hf:ORG/NAME:SPLIT or hf:ORG/NAME/CONFIG:SPLIT")
    return parts, split


def stream(
    name: str, split: str, config: str | None = None, revision: str | None = None, files: str | None = None
) -> Iterator[Row]:
    """The rows of a data set by its full name; `files` is a glob inside its repository, in place of what its own
    settings name. Raises ConfigError, at once where the Hub cannot be reached."""
    from datasets import load_dataset

    source = f"hf:{name}{f'/{config}' if config else ''}:{split}"
    with _as_config_error(source):
        _reach()
        chosen: dict[str, Any] = {"data_files": {split: files}} if files else {}
        rows: Any = load_dataset(name, config, split=split, revision=revision, streaming=True, **chosen)
        for number, fields in enumerate(rows, 1):
            yield Row(f"{source}:{number}", fields)


def _reach(timeout_s: float = 5.0) -> None:
    """Raises an OSError if nothing answers where the Hub should be: the library would try again for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConnectionError("HF_HUB_OFFLINE is set")
    at = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if at.hostname is None or urllib.request.getproxies():
        return  # Behind a proxy only the library knows the way.
    port = at.port or (443 if at.scheme == "https" else 80)
    try:
        socket.create_connection((at.hostname, port), timeout_s).close()
    except OSError as error:
        raise ConnectionError(f"{at.hostname} cannot be reached: {error.strerror or error}") from None


@contextmanager
def _as_config_error(source: str) -> Iterator[None]:
    # The Hub, the network and foreign file formats can fail in any way, and each is the source's failure.
    try:
        yield
    except Exception as error:
        way_out = "check the name, the split and the network, or use local files"
        raise ConfigError(f"{source} cannot be streamed ({one_line(error)}); {way_out}") from None
