"""What people write and what files hold (YAML, JSON, texts, paths) as plain values, or one line that says why not."""

import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import yaml

from sparsemix.durable import SEAL, damage
from sparsemix.errors import ConfigError, DamagedError

# More than any settings need; aliases make 10^9 values of 300 letters.
MAX_VALUES = 200_000
MAX_DEPTH = 100


class _Loader(yaml.SafeLoader):
    """Mappings with words as keys, lists, strings, numbers, true, false and null: what JSON holds, and settings are.

    Dates stay the words that they are. So does what only looks like a number (`0b_`, `12:30`, five thousand digits):
    the setting that it is meant for says what it takes."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # The scanner reads on to the end of an open bracket before anything is composed, in the square of their number.
        if self.flow_level >= MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        super().fetch_flow_collection_start(TokenClass)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in dict.fromkeys(own) if own.count(key) > 1 and key != "<<"]:
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        self.flatten_mapping(node)
        made: dict[Hashable, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a name must be a word, not a {key.id}")
            made[key.value] = self.construct_object(value, deep=deep)
        return made

    def as_written(self, node: Any) -> Any:
        text = self.construct_scalar(node)
        read = {"int": self.construct_yaml_int, "float": self.construct_yaml_float, "bool": self.construct_yaml_bool}
        try:
            # YAML 1.1 counts 12:30 in sixties.
            return text if ":" in text else read[node.tag.rpartition(":")[2]](node)
        except (ValueError, LookupError):
            return text


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_constructors = {
    tag: made
    for tag, made in yaml.SafeLoader.yaml_constructors.items()
    if tag in (None, *(_TAG + name for name in ("null", "str", "seq", "map")))
} | {_TAG + name: _Loader.as_written for name in ("int", "float", "bool")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _count(node: Any, known: dict[int, int]) -> int:
    """Values in a node with every alias written out. Raises YAMLError for one that holds itself, and for too many."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        # Met again before it is counted, it is inside itself.
        known[id(node)] = MAX_VALUES + 1
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    if known[id(node)] > MAX_VALUES:
        raise yaml.YAMLError(f"it holds itself, or more than {MAX_VALUES} values")
    return known[id(node)]


def read_yaml(text: str) -> Any:
    """The plain value of a YAML text, the caller's own. Raises YAMLError."""
    return deepcopy(_read(text))


# A plan asks for one recipe at every size of every arm, and reading a text takes twenty times as long as copying.
@lru_cache(maxsize=128)
def _read(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if it is missing or not a mapping."""
    return _loaded(path, read_yaml, "YAML", "")


def load_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ConfigError if it is missing or not a mapping."""
    return _loaded(path, json.loads, "JSON", "; write it anew or copy it whole")


def read_mapping(path: Path, way_out: str = "copy it anew, or delete the run's folder") -> dict[str, Any]:
    """The mapping in a .json or .yaml file that we wrote. Raises DamagedError where it holds none, or not what was
    written, by the checksums of its folder or by its own; files of earlier versions have neither."""
    read, what = (json.loads, "JSON") if path.suffix == ".json" else (read_yaml, "YAML")
    try:
        held = _held(path, read, what)
    except ValueError as error:
        raise DamagedError(f"{path} is damaged (it {error}); {way_out}") from None
    own = held.pop(CHECKSUM, None)
    if own is not None and own != _checksum(held):
        raise DamagedError(f"{path} is damaged (it is not what was written); {way_out}")
    if (path.parent / SEAL).is_file() and (told := damage(path.parent, [path.name])):
        raise DamagedError(f"{path} is damaged ({told}); {way_out}")
    return held


# Of a file that stands where no folder's checksums fit: the SHA-256 of its other values, however they are laid out.
CHECKSUM = "sha256_of_the_rest"


def checked_json(mapping: dict[str, Any], **how: Any) -> str:
    """The text of a JSON file that holds the mapping and its checksum, which `read_mapping` compares; `how` goes to
    json.dumps."""
    # As it will be read: names that are numbers are words there.
    return json.dumps({CHECKSUM: _checksum(json.loads(json.dumps(mapping))), **mapping}, indent=1, **how)


def _checksum(mapping: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()


def _loaded(path: Path, read: Callable[[str], Any], what: str, way_out: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: {'this is a folder; name a file' if path.is_dir() else 'no such file'}")
    try:
        return _held(path, read, what)
    except ValueError as error:
        raise ConfigError(f"{path} {error}{way_out}") from None


def _held(path: Path, read: Callable[[str], Any], what: str) -> dict[str, Any]:
    """The mapping in a file. Raises ValueError that says what it is instead, as `it ...`."""
    if path.is_dir():
        raise ValueError("is a folder")
    try:
        raw = read(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid {what}: not UTF-8 at byte {error.start}") from None
    # A file of nothing but brackets is deeper than Python's stack.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"is not valid {what}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"must hold settings (a mapping), not {type(raw).__name__}")
    return raw


@contextmanager
def trusted(path: Path) -> Iterator[None]:
    """Inside, values that a file holds are used as what they should be. Raises DamagedError where they are not."""
    try:
        yield
    except ConfigError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        OSError,
        EOFError,
        BadZipFile,
        zlib.error,
    ) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise DamagedError(f"{path} is damaged ({told}); copy it anew, or make it again") from error


def tried(place: Path, setting: str, folder: bool = False) -> None:
    """Raises ConfigError where the file `place`, or files in it if it is to be a `folder`, could not be written; to be
    asked before any work is done for it. Nothing is left."""
    there = place if folder else place.parent
    if not folder and place.is_dir():
        raise ConfigError(f"{setting}={place} is a folder; name a file")
    while not there.exists():
        if not folder:
            raise ConfigError(f"{setting}={place}: there is no folder {there}; make it or choose another place")
        if there.is_symlink() or there == there.parent:
            break
        there = there.parent
    if not there.is_dir():
        where = "" if there == place else f": {there}"
        raise ConfigError(f"{setting}={place}{where} is no folder; choose another place")
    try:
        # Only trying tells: rights, read-only disks and folders of the system.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        where = f"{setting}={place}: the folder {there} cannot be written ({error.strerror})"
        raise ConfigError(f"{where}; choose another place") from None


def refuse_used(to: Path) -> None:
    """Raises ConfigError where there is something already."""
    if to.exists() and not to.is_dir():
        raise ConfigError(f"to={to} is no folder; name a new one")
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"to={to} is not empty; name a new folder")


def expanded(name: str | Path) -> Path:
    """The path with `~` written out. Raises ConfigError where there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ConfigError(f"{name}: nobody knows this home; write the folder out, or set HOME") from None
