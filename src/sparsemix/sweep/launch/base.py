"""What every launcher is and can be told."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from pydantic import Field

from sparsemix.config import Config, ConfigError, apply_overrides, nearest, parse


class Launcher(Protocol):
    """Hands out work to processes, `workers` at a time with `threads` threads each. A context manager: leaving it with
    an exception lets every worker save a checkpoint first, and waits for that."""

    workers: int
    threads: int

    def map(
        self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], watch: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """(position, result or exception) of `work(*job)` as each ends; `watch` is called about twice a second.
        A worker that died is a WorkerLostError, and the others go on."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LaunchConfig(Config):
    """Where runs are trained; the family of launchers. workers: runs at a time; threads: of each."""

    family: ClassVar[dict[str, type[Config]] | None] = {}
    workers: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)


def launch_config(name: str, settings: Sequence[str] = (), workers: int | None = None) -> LaunchConfig:
    """The settings of the launcher called `name`, some given as `threads=2`. Raises ConfigError."""
    if name not in (known := LaunchConfig.family or {}):
        raise ConfigError(f"launcher={name} is none of {', '.join(sorted(known))}{nearest(name, known)}")
    given = apply_overrides({"workers": workers}, settings)
    if "kind" in given:
        raise ConfigError(f"launch=kind={given['kind']} would have no effect: --launcher says where runs go")
    return parse(LaunchConfig, {"kind": name, **given})
