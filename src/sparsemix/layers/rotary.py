"""Rotary positions: how fast every channel pair turns, and the turning."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from sparsemix.config import Config


class RopeScaling(Config):
    """Slower turning, for sequences longer than those trained on.

    `linear`: every pair `factor` times slower. `llama3`: so only the pairs that make at most low_freq_factor turns in
    original_seq_len tokens; those with high_freq_factor turns or more as before; in between a blend, linear in the
    number of turns. Sources: arXiv:2306.15595; arXiv:2407.21783 names the second, released code defines it."""

    kind: Literal["linear", "llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_seq_len: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _rules(self) -> "RopeScaling":
        llama3 = self.kind == "llama3"
        self.rule(
            llama3 == (self.original_seq_len is not None), "original_seq_len", "is for kind=llama3, which needs it"
        )
        low = self.low_freq_factor
        self.rule(self.high_freq_factor > low, "high_freq_factor", f"must be more than low_freq_factor={low}")
        return self

    def apply(self, speed: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The angles per position, scaled."""
        if self.original_seq_len is None:
            return speed / self.factor
        turns = self.original_seq_len * speed / (2 * torch.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return speed * (kept + (1 - kept) / self.factor)


def rotation(
    positions: Int[Tensor, "B T"],
    d_head: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Tensor, "B 1 T d"], Float[Tensor, "B 1 T d"]]:
    """Cosine and sine of position * theta^(-2i/d_head), scaled, computed in fp32 (fp64 for fp64 inputs)."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.arange(0, d_head, 2, device=positions.device, dtype=exact) / d_head
    speed = theta**-steps if scaling is None else scaling.apply(theta**-steps)
    angle = positions[:, None, :, None].to(exact) * speed  # (B, 1, T, d_head / 2)
    # A compiler would fuse them into what reads them, and compute them anew for every head.
    if torch.compiler.is_compiling():
        return torch.ops.sparsemix.cos_sin(angle, dtype)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@torch.library.custom_op("sparsemix::cos_sin", mutates_args=())
def _cos_sin(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return angle.cos().to(dtype), angle.sin().to(dtype)


@_cos_sin.register_fake
def _(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(angle, dtype=dtype), torch.empty_like(angle, dtype=dtype)


def rotate(
    x: Float[Tensor, "B H T e"], cos: Float[Tensor, "b 1 T d"], sin: Float[Tensor, "b 1 T d"]
) -> Float[Tensor, "B H T e"]:
    """x with each channel pair (i, i + d_head/2) turned by its angle. Source: arXiv:2104.09864, with the first and
    second half of a head's channels forming the pairs."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
