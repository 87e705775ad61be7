"""Sources -> documents -> shards in a folder, in bounded memory."""

import errno
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from sparsemix.config import ConfigError
from sparsemix.data.corpus import SPLITS
from sparsemix.data.documents import read_documents
from sparsemix.data.files import stamp
from sparsemix.data.near_duplicates import Index, keep
from sparsemix.data.origins import Origins
from sparsemix.data.shards import DataConfig, Shards
from sparsemix.data.shingles import pieces as cuts
from sparsemix.data.split import Sides, split, uniform, warnings
from sparsemix.data.spool import Spool, batched
from sparsemix.data.tally import Tally
from sparsemix.data.write_shards import Pieces, write_shards
from sparsemix.durable import aside, seal

Progress = Callable[[str, int, int | None], None]


class Corpus(NamedTuple):
    """The documents that stay, their groups and places (see `split`), what each came from; the number dropped; whether
    they are pieces of the documents that were read."""

    spool: Spool
    groups: Int64[np.ndarray, "D"]
    sources: Int64[np.ndarray, "D"]
    places: Float64[np.ndarray, "D"]
    dropped: int
    cut: bool = False


def prepare(config: DataConfig, folder: Path, progress: Progress | None = None) -> Shards:
    """The shards of `config` in `folder`, written there unless they already are.

    The folder appears whole or not at all, and whether it can be written is tried before anything is read. Finished
    shards of the same settings are reused without reading the text if `config.fingerprint` names them, or if no source
    file has changed since (size, time); they need no sources. progress gets (stage, done, total).

    Memory does not grow with the text, but by some 150 bytes for each document: the texts wait in a nameless file
    beside `folder`. Raises ConfigError for unreadable text, a folder that cannot be written or holds something else,
    and a text that is not the one that `config.fingerprint` or the shards name."""
    report = progress or (lambda stage, done, total: None)
    missing: list[Path] = []
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            return _reuse(config, folder, report)
        missing = [parent for parent in folder.absolute().parents if not parent.exists()]
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with aside(folder) as temporary:
            temporary.mkdir()
            _prepare(config, temporary, report)
    except OSError as error:
        # Another process may have prepared the same folder meanwhile.
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and (folder / "manifest.json").is_file():
            return _reuse(config, folder, report)
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        for parent in missing:
            # What fails leaves no empty folders that were not there.
            with suppress(OSError):
                parent.rmdir()
    return Shards.open(folder)


def _prepare(config: DataConfig, folder: Path, report: Progress) -> None:
    mark_of_files, tally = stamp(config.text, config.text_as), Tally()
    with ExitStack() as files:
        found = _collect(config, files, folder, report, tally)
        tally.duplicates = found.dropped
        mark = fingerprint(found.spool.hashes)
        if config.fingerprint not in (None, mark):
            rule = f"the text is now {mark}; restore it, or drop the setting"
            raise ConfigError(f"fingerprint={config.fingerprint}: {rule}")
        fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
        rule = {"ordered": config.split == "time", "cut": config.split in ("hash", "time")}
        sides = split(found.spool, found.groups, found.places, fractions, **rule)
        facts = {
            "fingerprint": mark,
            "stamp": mark_of_files,
            "read": tally.as_dict(),
            "duplicates_dropped": found.dropped,
            "cut_into_pieces": found.cut,
            "documents_cut_apart": len(sides.apart),
            "warnings": warnings(sides, found.spool.sizes, fractions),
        }
        write_shards(config, folder, found.spool, pieces_of(found, sides), facts, report)
    seal(folder)


_WAY_OUT = "choose another folder, or delete it if no run was trained on it"


def _reuse(config: DataConfig, folder: Path, report: Progress) -> Shards:
    shards = Shards.open(folder)
    asked = config.model_dump(mode="json", exclude={"fingerprint"})
    # A setting that is not named has its default: shards outlive the version that wrote them.
    default = DataConfig().model_dump(mode="json") | {"split": DataConfig().split, "text_as": []}
    there, asked = ({**default, **named, "fingerprint": None} for named in (shards.manifest["settings"], asked))
    if differ := [f"{k}={there.get(k)} there, {asked[k]} asked" for k in asked if there.get(k) != asked[k]]:
        raise ConfigError(f"{folder} holds shards of other settings: {'; '.join(differ)}; {_WAY_OUT}")
    held = wanted = shards.manifest["fingerprint"]
    if config.fingerprint is not None:
        wanted = config.fingerprint
    elif stamp(config.text, config.text_as) not in (None, shards.manifest["stamp"]):
        with ExitStack() as files:
            wanted = fingerprint(_collect(config, files, None, report, Tally()).spool.hashes)
    if wanted != held:
        raise ConfigError(f"{folder} holds shards of the text {held}, not {wanted}; {_WAY_OUT}")
    return shards


def fingerprint(hashes: UInt8[np.ndarray, "D 32"]) -> str:
    """SHA-256 over the sorted SHA-256 of the texts, in hex: names the corpus whatever the order of its documents."""
    digest = hashlib.sha256()
    ordered = hashes[hash_order(hashes)]
    for start in range(0, len(ordered), 1 << 16):
        digest.update(ordered[start : start + (1 << 16)].tobytes().hex().encode())
    return digest.hexdigest()


def hash_order(hashes: UInt8[np.ndarray, "D 32"]) -> Int64[np.ndarray, "D"]:
    """The indices that sort the hashes."""
    words = np.ascontiguousarray(hashes).view(">u8").astype(np.uint64)  # (D, 4)
    return np.lexsort(words.T[::-1])


def _collect(config: DataConfig, files: ExitStack, folder: Path | None, report: Progress, tally: Tally) -> Corpus:
    """The documents without duplicates. Fewer than three are cut into pieces, which are then the documents."""
    origins = Origins(config.split, config.text)
    documents = read_documents(config.text, lambda done: report("reading", done, None), config.text_as, tally)
    spool, index, kept = _distinct(origins.noted(documents), files, folder, report)
    found, dropped = spool.only(np.flatnonzero(kept)), int((~kept).sum())
    origins.check(kept)
    numbers = origins.numbers
    if len(np.unique(numbers[kept])) >= len(SPLITS):
        groups = origins.groups(kept) if origins.named else index.clusters(kept, numbers)[kept]
        places = origins.newest_first(kept) if config.split == "time" else uniform(found.hashes)
        return Corpus(found, groups, groups, places, dropped)
    size, source = int(found.sizes.sum()) / 200, []
    pieces = _all_pieces(found, size, numbers[kept].tolist(), source)
    spool, _, kept = _distinct(pieces, files, folder, report)
    found = spool.only(np.flatnonzero(kept))
    if len(found) < len(SPLITS):
        rule = f"holds {len(found)} different paragraphs or lines, but each of the three splits needs one"
        raise ConfigError(f"text={', '.join(config.text)} {rule}; add text")
    # A text of its own has no date inside: what comes later in it counts as newer.
    places = np.arange(len(found))[::-1] / len(found) if config.split == "time" else uniform(found.hashes)
    return Corpus(found, np.arange(len(found)), np.array(source)[kept], places, dropped + int((~kept).sum()), True)


def _distinct(
    texts: Iterable[str], files: ExitStack, folder: Path | None, report: Progress
) -> tuple[Spool, Index, Bool[np.ndarray, "D"]]:
    """(all texts, their index, which of them stay)."""
    spool, index = Spool(files, folder), Index(files, folder)
    for batch in batched(texts, len):
        spool.add(batch)
        index.add(batch)
    return spool, index, keep(spool, index, report)


def _all_pieces(spool: Spool, size: float, numbers: Sequence[int], source: list[int]) -> Iterator[str]:
    """The pieces of all texts; `source` gets the number of the document that each is from."""
    for number, text in zip(numbers, spool.texts(range(len(spool))), strict=True):
        for piece in _pieces(text, size):
            source.append(number)
            yield piece


def _pieces(text: str, size: float) -> Iterator[str]:
    """Whole paragraphs, joined to at least `size` characters; whole lines if there are fewer than three paragraphs,
    else words, else what is left of them: 200 cuts."""
    ways: tuple[Callable[[], list[str]], ...] = (
        lambda: re.split(r"(?<=\n\n)(?!\n)", text),
        lambda: text.splitlines(keepends=True),
        lambda: list(cuts(text, max(1, int(size)))),
    )
    units = next((found for way in ways if len(found := way()) >= len(SPLITS)), [text])
    piece: list[str] = []
    held = 0
    for unit in units:
        piece.append(unit)
        held += len(unit)
        if held >= size and any(part.strip() for part in piece):
            yield "".join(piece)
            piece, held = [], 0
    if any(part.strip() for part in piece):
        yield "".join(piece)


def pieces_of(found: Corpus, sides: Sides) -> dict[str, Pieces]:
    """What each split holds, in the order of the hash of its text."""
    spool = found.spool
    whole = np.ones(len(spool), bool)
    whole[list(sides.parts)] = False
    documents = np.flatnonzero(whole)
    columns = [documents, np.zeros(len(documents), np.int64), spool.sizes[documents], sides.of[documents]]
    hashes = [spool.hashes[documents]]
    for document, parts in sides.parts.items():
        for first, last, side in parts:
            columns = [np.append(c, v) for c, v in zip(columns, (document, first, last, side), strict=True)]
            hashes.append(np.frombuffer(hashlib.sha256(spool.raw(document, first, last)).digest(), np.uint8)[None])
    order = hash_order(np.concatenate(hashes))
    document, first, last, side = (column[order] for column in columns)
    return {
        split: Pieces(*(c[side == number] for c in (document, first, last, found.sources[document])))
        for number, split in enumerate(SPLITS)
    }
