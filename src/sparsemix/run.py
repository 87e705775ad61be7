"""Run = a folder: config.yaml, metrics.jsonl, checkpoints/, model/, result.json. No torch here."""

import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from sparsemix.config import Config, ConfigError, parse, to_yaml


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or none of it; text as UTF-8."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Run:
    """One training run's folder. Opening it writes config.yaml, or checks that it holds the same settings."""

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        self.folder = folder
        if config is None:
            if not (folder / "config.yaml").is_file():
                raise ConfigError(f"{folder} is no run folder: it has no config.yaml; name a folder that a run wrote")
            return
        if (folder / "config.yaml").is_file():
            if not self._holds(config):
                raise ConfigError(f"{folder} holds a run with other settings; choose another folder or delete it")
        elif folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and holds no run; choose another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "config.yaml", to_yaml(config))

    def _holds(self, config: Config) -> bool:
        """Are these the folder's settings? One that is younger than the folder counts with its default."""
        try:
            return parse(type(config), self.settings) == config
        except ConfigError:
            return False

    @property
    def settings(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))

    @property
    def result(self) -> dict[str, Any] | None:
        """The run's result, or None while it is unfinished."""
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, result: dict[str, Any]) -> None:
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1))

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged lines; a last line that a killed process left half-written is left out."""
        path = self.folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run logs it again."""
        if (self.folder / "metrics.jsonl").is_file():
            kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
            write_atomic(self.folder / "metrics.jsonl", "".join(kept))

    def log(self, **values: Any) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("sparsemix", "torch", "numpy", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def hardware() -> str:
    """The processor and its cores, in words."""
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} cores"
