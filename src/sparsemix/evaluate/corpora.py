"""Evaluation corpora: a YAML file each, read from local files or from the Hugging Face Hub, as passages."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field, model_validator

from sparsemix.config import Config, ConfigError, load_yaml, nearest, parse
from sparsemix.data import hub
from sparsemix.data.documents import text_field
from sparsemix.data.files import match
from sparsemix.data.rows import Row, read_rows
from sparsemix.data.tally import Tally

FOLDER = Path(__file__).parent / "suites"


class HubConfig(Config):
    """A data set of the Hub, streamed: at most max_rows of its rows. `files` is a glob inside its repository, for data
    sets whose own settings cannot be read."""

    name: str
    split: str
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    max_rows: int | None = Field(default=None, ge=1)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.name}{f'/{self.config}' if self.config else ''}:{self.split}{at}"


class CorpusConfig(Config):
    """Where a corpus is found and how it is scored.

    files: globs below the data folder; local files come before the hub. text, source: names of the field, the first
    that a row has; a dot leads into a field of fields. source names a document's part of the corpus. words: also
    perplexity per white-space-separated word. last_word: also perplexity and accuracy of the last word, which is what
    follows `context` where a row has that field, else what follows the last space. max_documents: of each source."""

    about: str
    licence: str
    files: tuple[str, ...] = ()
    hub: HubConfig | None = None
    text: tuple[str, ...] = Field(default=("text",), min_length=1)
    source: tuple[str, ...] = ()
    words: bool = False
    last_word: bool = False
    max_documents: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _somewhere(self) -> "CorpusConfig":
        self.rule(bool(self.files) or self.hub is not None, "files", "is empty, and there is no hub; give one of them")
        return self


class SuiteConfig(Config):
    """Names of packaged corpora, or paths of YAML files as this file sees them."""

    corpora: tuple[str, ...] = Field(min_length=1)


def suites() -> list[str]:
    """Names of the packaged suites."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def corpora() -> list[str]:
    """Names of the packaged corpora."""
    return sorted(path.stem for path in (FOLDER / "corpora").glob("*.yaml"))


def read_suite(suite: str, only: Sequence[str] = ()) -> dict[str, CorpusConfig]:
    """The corpora of a packaged suite, or of a YAML file that is a suite or a single corpus, by name; of them those in
    `only`, if any. Raises ConfigError."""
    is_file = Path(suite).suffix in (".yaml", ".yml")
    if suite not in suites() and not is_file:
        known = [*suites(), *corpora()]
        if suite not in known:
            rule = f"is none of {', '.join(suites())}, no corpus ({', '.join(corpora())}) and no .yaml file"
            raise ConfigError(f"suite={suite} {rule}{nearest(suite, known)}")
        found = {suite: _corpus(FOLDER / "corpora" / f"{suite}.yaml")}
    else:
        path = Path(suite) if is_file else FOLDER / f"{suite}.yaml"
        raw = _yaml(path)
        found = _listed(path, raw) if "corpora" in raw else {path.stem: _corpus(path)}
    for name in only:
        if name not in found:
            raise ConfigError(f"only={name} is none of {', '.join(found)}{nearest(name, found)}")
    return {name: corpus for name, corpus in found.items() if not only or name in only}


def _listed(path: Path, raw: dict[str, Any]) -> dict[str, CorpusConfig]:
    found: dict[str, CorpusConfig] = {}
    for name in _parsed(SuiteConfig, path, raw).corpora:
        packaged = name in corpora()
        if not packaged and Path(name).suffix not in (".yaml", ".yml"):
            known = corpora()
            raise ConfigError(
                f"{path}: corpora={name} is none of {', '.join(known)} and no .yaml file{nearest(name, known)}"
            )
        at = FOLDER / "corpora" / f"{name}.yaml" if packaged else path.parent / name
        if at.stem in found:
            raise ConfigError(f"{path}: corpora={name}: {at.stem} is there twice; rename one of the files")
        found[at.stem] = _corpus(at)
    return found


def _corpus(path: Path) -> CorpusConfig:
    return _parsed(CorpusConfig, path, _yaml(path))


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a suite's or corpus's YAML, or one of {', '.join(suites())}")
    return load_yaml(path)


C = TypeVar("C", bound=Config)


def _parsed(cls: type[C], path: Path, raw: dict[str, Any]) -> C:
    try:
        return parse(cls, raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class Found(NamedTuple):
    """The rows of a corpus, where they come from (`files` with their SHA-256, or `hub`), and what is read of them."""

    rows: Iterable[Row]
    origin: dict[str, Any]
    tally: Tally


def find(corpus: CorpusConfig, data_dir: Path | None) -> Found:
    """Local files below data_dir if it has any of the corpus, else the hub. Raises ConfigError if there is neither."""
    columns, tally = (*corpus.text, *corpus.source, "context"), Tally()
    paths = [] if data_dir is None else _local(corpus, data_dir, tally)
    if data_dir is not None and paths:
        marks = {path.relative_to(data_dir).as_posix(): _sha256(path) for path in paths}
        return Found(read_rows(paths, columns, tally=tally), {"files": marks}, tally)
    if data_dir is None:
        missing = "no data folder was named (--data-dir or SPARSEMIX_DATA)"
    else:
        missing = f"no file {' or '.join(corpus.files)} below {data_dir}"
    if corpus.hub is None:
        raise ConfigError(f"{missing}, and the corpus has no hub")
    tally.data_sets = 1
    return Found(_streamed(corpus.hub, missing), {"hub": str(corpus.hub)}, tally)


def _local(corpus: CorpusConfig, data_dir: Path, tally: Tally) -> list[Path]:
    found = {path for pattern in corpus.files for path in match(data_dir, pattern, tally)}
    tally.found = len(found)
    return sorted(found)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None


def _streamed(at: HubConfig, missing: str) -> Iterator[Row]:
    try:
        yield from islice(hub.stream(at.name, at.split, at.config, at.revision, at.files), at.max_rows)
    except ConfigError as error:
        raise ConfigError(f"{missing}; {error}") from None


class Passage(NamedTuple):
    """One document; word_at is the character at which what precedes its last word ends, where that is asked for."""

    source: str
    text: str
    word_at: int | None


def passages(name: str, corpus: CorpusConfig, rows: Iterable[Row], tally: Tally | None = None) -> Iterator[Passage]:
    """The documents of a corpus that are more than white space or null, counted in the tally. Raises ConfigError for a
    row that has no text."""
    tally = tally if tally is not None else Tally()
    for row in rows:
        if all(path in row.fields and row.fields[path] is None for path in corpus.text):
            tally.skip("row", "its text is null", row.name)
            continue
        text = _text(corpus, row)
        if not text.strip():
            tally.skip("document", "only white space", row.name)
            continue
        tally.documents += 1
        tally.bytes += len(text.encode())
        source = next((v for path in corpus.source if isinstance(v := _at(row.fields, path), str)), name)
        yield Passage(source, text, _word_at(row, text) if corpus.last_word else None)


def _text(corpus: CorpusConfig, row: Row) -> str:
    text = next((v for path in corpus.text if isinstance(v := _at(row.fields, path), str)), None)
    text = text_field(row, corpus.text[-1]) if text is None else text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"has a lone surrogate at character {error.start}"
        raise ConfigError(f"{row.name}: the text {rule}; repair or remove that document") from None
    return text


def _at(fields: dict[str, Any], path: str) -> Any:
    if path in fields:
        return fields[path]
    head, dot, rest = path.partition(".")
    inner = fields.get(head)
    return _at(inner, rest) if dot and isinstance(inner, dict) else None


def _word_at(row: Row, text: str) -> int:
    context = row.fields.get("context")
    at = len(context) if isinstance(context, str) else text.rstrip().rfind(" ")
    if at < 1 or (isinstance(context, str) and not (text.startswith(context) and text[at:].strip())):
        raise ConfigError(f"{row.name}: the text must be a context and a last word; mend or remove that document")
    return at
