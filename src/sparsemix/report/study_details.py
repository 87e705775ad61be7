"""What a study's page says beyond its analysis, read from the runs' settings and results."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsemix.errors import DamagedError
from sparsemix.inputs import read_mapping, trusted
from sparsemix.provenance import joined
from sparsemix.report.numbers import fixed
from sparsemix.report.records import Record

# They differ from run to run of one arm.
OF_A_RUN = ("seed", "train.lr", "train.budget_flops")


def details(records: Sequence[Record], out: Path, say: Callable[[str], None] = warnings.warn) -> dict[str, Any]:
    """For the runs in the order of `records`: `links` from `out` to their folders, `layers` (sizes, FLOPs, memory);
    for all: `differences` of the arms' settings, `hardware`, `versions`, `kernels`; by link `inspections`, `texts`. A
    damaged inspection is said and left out."""
    links = [Path(os.path.relpath(record.folder, out)).as_posix() for record in records]
    told = {name: joined(*(record.result.get(name) or {} for record in records)) for name in ("versions", "kernels")}
    return {
        "links": links,
        "layers": [layers(record) for record in records],
        "differences": differences(records),
        "hardware": sorted({str(record.result["hardware"]) for record in records if record.result.get("hardware")}),
        **told,
        "inspections": dict(_inspections(records, links, say)),
        "texts": {link for record, link in zip(records, links, strict=True) if (record.folder / TEXT).is_file()},
    }


# Where `sparsemix inspect` and `sparsemix generate --show routing` write what they found in a run.
INSPECTION, TEXT = "inspect/inspect.json", "generation.html"


def _inspections(
    records: Sequence[Record], links: Sequence[str], say: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for record, link in zip(records, links, strict=True):
        path = record.folder / INSPECTION
        if not path.is_file():
            continue
        try:
            with trusted(path):
                runs = read_mapping(path, "`sparsemix inspect` writes it anew")["runs"]
                alone = runs[0] if len(runs) == 1 else None
        except DamagedError as error:
            say(f"left out: {error}")
            continue
        if alone is not None:
            yield link, alone


def layers(record: Record) -> dict[str, Any]:
    """Sizes of the run's special feed-forward (its first plain one if all are plain), and what a token takes."""
    found = [node for node in _nodes(record.settings["model"]["blocks"]) if "d_ff" in node or "num_experts" in node]
    special = [node for node in found if node.get("kind") != "dense"] or found
    node = special[0] if special else {}
    return {
        "d_ff": node.get("d_ff"),
        "num_experts": node.get("num_experts"),
        "forward_flops": record.forward_flops,
        "activation_bytes": record.result.get("activation_bytes_per_token"),
    }


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of the settings, outer ones first."""
    if isinstance(node, dict):
        yield node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(part)


def differences(records: Sequence[Record]) -> list[tuple[str, dict[str, str]]]:
    """(setting, its value by arm) where arms differ, told by one run each: at the width that most arms have in common.
    Equal differences of several blocks are one line."""
    used = [record for record in records if record.role != "rate"] or list(records)
    arms = list(dict.fromkeys(record.arm for record in used))
    widths: dict[tuple[float, int], set[str]] = {}
    for record in used:
        widths.setdefault((record.budget, record.settings["model"]["d_model"]), set()).add(record.arm)
    common = max(widths, key=lambda at: len(widths[at]))
    told: dict[str, dict[str, Any]] = {}
    for arm in arms:
        own = [record for record in used if record.arm == arm]
        nearest = min(own, key=lambda r: (abs(r.settings["model"]["d_model"] - common[1]), r.budget != common[0]))
        told[arm] = dict(_flat(nearest.settings))
    paths = dict.fromkeys(path for settings in told.values() for path in settings)
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path in paths:
        values = tuple(_said(told[arm], path) for arm in arms)
        if len(set(values)) > 1 and path not in OF_A_RUN:
            parts = path.split(".")
            numbers = [part for part in parts if part.isdigit()]
            name = ".".join("*" if part.isdigit() else part for part in parts)
            groups.setdefault((name, values), []).extend(numbers[:1])
    return [
        (name.replace("*", ",".join(dict.fromkeys(numbers)), 1), dict(zip(arms, values, strict=True)))
        for (name, values), numbers in groups.items()
    ]


def _said(settings: dict[str, Any], path: str) -> str:
    value = settings.get(path, "–")
    return fixed(value, 0) if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every setting. What Mixture-of-Depths wraps keeps the path it would have without, so that
    only the wrapper's own settings differ."""
    if isinstance(node, dict) and node.get("kind") == "mod" and isinstance(node.get("inner"), dict):
        own = {name: value for name, value in node.items() if name not in ("kind", "inner")}
        node = {**node["inner"], "mod": own or "yes"}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if not isinstance(node, dict | list):
        yield path, node
    for name, part in items:
        yield from _flat(part, f"{path}.{name}" if path else str(name))
