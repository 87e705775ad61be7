"""What a result came from: versions, commit and processor, as results say it."""

import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from sparsemix import __version__
from sparsemix.commit import commit


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit of this package where it is known."""
    # Not by metadata: what is imported may be another copy than what is installed.
    found = {"python": platform.python_version(), "sparsemix": __version__}
    found |= {"commit": known} if (known := commit()) else {}
    return found | {name: metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}


def joined(*several: Mapping[str, str]) -> dict[str, str]:
    """What is said of each name anywhere: `{"torch": "2.13.0; 2.14.0"}`, of a run that went on under another version,
    or of several runs."""
    found: dict[str, list[str]] = {}
    for told in several:
        for name, values in told.items():
            for value in values.split("; "):
                if value not in found.setdefault(name, []):
                    found[name].append(value)
    return {name: "; ".join(values) for name, values in found.items()}


def hardware() -> str:
    """The processor and its cores, in words."""
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} cores"
