"""What there is to reproduce, by name, from papers/*.yaml alone: the command line asks before anything heavy loads."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sparsemix.config import ConfigError, nearest

PAPERS = Path(__file__).parent / "papers"


class Entry(NamedTuple):
    """What papers/*.yaml says of a name: where it is from, what the paper claims, which module makes it, and the
    paper's own numbers as that module lays them out. `how`: `printed`, `digitised` or `read by eye`."""

    name: str
    source: str
    claim: str
    module: str
    how: str
    numbers: dict[str, Any]


@cache
def entries() -> Mapping[str, Entry]:
    """Every reproduction by name, in the papers' order."""
    found: dict[str, Entry] = {}
    for path in sorted(PAPERS.glob("*.yaml")):
        for name, raw in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            found[name] = Entry(name, raw["source"], raw["claim"], raw["module"], raw["how"], raw.get("numbers", {}))
    return found


def entry(name: str) -> Entry:
    """Raises ConfigError on an unknown name."""
    known = entries()
    if name not in known:
        raise ConfigError(f"name={name} is none of {', '.join(known)}{nearest(name, known)}")
    return known[name]
