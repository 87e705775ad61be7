"""Which implementation of an op runs: `auto` picks by device and dtype, a name asks for one and gets it or an error."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsemix.errors import ConfigError
from sparsemix.ops import build, native

# reference reads like the equation; torch uses PyTorch's own kernels; native is C on the CPU; triton is for GPUs.
IMPLS = ("auto", "reference", "torch", "native", "triton")
_picked: dict[str, str] = {}


@dataclass(frozen=True)
class Kernels:
    """What an op has besides reference and torch: a C source, Triton kernels, and the dtypes that both take."""

    op: str
    source: Path | None = None
    triton: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def refuses(self, impl: str, device: str, dtype: torch.dtype) -> str | None:
        """Why `impl` cannot run on this device and dtype, None if it can."""
        if impl in ("reference", "torch"):
            return None
        if (self.source is None) if impl == "native" else not self.triton:
            return "the op has no such kernel"
        if dtype not in self.dtypes:
            return f"the kernel takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {dtype}"
        if impl == "native":
            assert self.source is not None
            return "native kernels run on the CPU" if device != "cpu" else build.unusable(self.source)
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels run on a GPU (TRITON_INTERPRET=1 interprets them)"
        return None

    def pick(self, impl: str, *operands: Tensor, refused: str | None = None) -> str:
        """The implementation to run for all these floating operands: SPARSEMIX_IMPL stands in for `auto`. `refused`
        says what else, such as sizes, keeps native and Triton kernels from them. Raises ConfigError if an explicit
        wish cannot be had."""
        device = operands[0].device.type
        wish = os.environ.get("SPARSEMIX_IMPL", "auto") if impl == "auto" else impl
        if wish not in IMPLS:
            raise ConfigError(f"impl={wish} is none of {', '.join(IMPLS)}")
        if wish == "auto":
            fast = "triton" if device == "cuda" else "native"
            wish = "torch" if refused or self._refusal(fast, operands) else fast
        elif reason := self._refusal(wish, operands) or (refused if wish in ("native", "triton") else None):
            raise ConfigError(f"{self.op}: impl={wish} cannot run here: {reason}; use impl=auto")
        _picked[self.op] = wish
        return wish

    def _refusal(self, impl: str, operands: tuple[Tensor, ...]) -> str | None:
        """Why `impl` cannot run on one of them."""
        kinds = {(x.device.type, x.dtype) for x in operands}
        return next((reason for kind in kinds if (reason := self.refuses(impl, *kind))), None)

    def call(self, name: str, *args: Tensor | int | float | None) -> None:
        """Run one C kernel of this op, after `pick` said native."""
        assert self.source is not None
        native.call(self.source, name, *args)


def picked() -> dict[str, str]:
    """Op -> the implementation that ran last in this process, or since `own_picks` began."""
    return dict(sorted(_picked.items()))


@contextmanager
def own_picks() -> Iterator[None]:
    """`picked` tells of the block alone, not of what the process did before."""
    before = dict(_picked)
    _picked.clear()
    try:
        yield
    finally:
        inside = dict(_picked)
        _picked.clear()
        _picked.update(before | inside)
