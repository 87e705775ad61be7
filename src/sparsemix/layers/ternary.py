"""BitNet b1.58 in training: which weights are ternary, and a forward through them with straight-through gradients."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_serializer, model_validator
from torch import Tensor
from torch.nn import functional as F

from sparsemix.config import Config, named
from sparsemix.layers.base import Layer
from sparsemix.ops.grouped_mm import grouped_mm
from sparsemix.ops.ternary_mm import int8_row_values, spread, ternary_values

PRECISIONS = ("float", "ternary")


class PrecisionConfig(Config):
    """Numbers of a layer's matrices. A plain name, such as `ternary`, stands for `{weights: ternary}`.

    sub_norm: RMSNorm before the last matrix (SubLN); null means exactly with ternary weights. warmup_steps: the share
    of quantisation rises from 0 to 1 over so many steps, for fine-tuning a float model."""

    weights: Literal["float", "ternary"] = "float"
    sub_norm: bool | None = None
    warmup_steps: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, raw: Any) -> Any:
        return named("weights", raw, PRECISIONS)

    @model_validator(mode="after")
    def _rules(self) -> "PrecisionConfig":
        self.rule(self.ternary or not self.warmup_steps, "warmup_steps", "needs weights: ternary")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: Any) -> str | dict[str, Any]:
        """The plain name where nothing else is set."""
        plain = self.sub_norm is None and not self.warmup_steps
        return self.weights if plain else handler(self)

    def __str__(self) -> str:
        said = self.model_dump()
        return said if isinstance(said, str) else ", ".join(f"{name} {value}" for name, value in said.items())

    @property
    def ternary(self) -> bool:
        return self.weights == "ternary"

    @property
    def normed(self) -> bool:
        """Is there a norm before the last matrix?"""
        return self.ternary if self.sub_norm is None else self.sub_norm

    @property
    def weight_bytes(self) -> float:
        """Bytes a weight takes at inference, in memory and on disk: two bits, or fp32."""
        return 0.25 if self.ternary else 4.0

    def warmup(self) -> "Warmup | None":
        return Warmup(self.warmup_steps) if self.warmup_steps else None


FLOAT = PrecisionConfig()


class Warmup(Layer):
    """share = min(steps / warmup_steps, 1), where `update` counts the optimizer's steps."""

    step: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.step += 1

    def share(self) -> Float[Tensor, ""]:
        return (self.step.float() / self.steps).clamp_max(1)


def straight_through(
    real: Float[Tensor, "*B"], codes: Float[Tensor, "*B"], warmup: Warmup | None
) -> Float[Tensor, "*B"]:
    """real + share (codes - real) in value, and exactly `codes` at share 1; real in gradient."""
    if warmup is not None:
        codes = torch.lerp(real.detach(), codes, warmup.share().to(real.dtype))
    return codes.detach() + (real - real.detach())


def quantised_rows(
    x: Float[Tensor, "*B D"], warmup: Warmup | None
) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B 1"]]:
    """Codes of each row in [-127, 127] as floats, and what they are multiplied by. The scale is a constant."""
    codes, scale = int8_row_values(x.detach())
    return straight_through(x.to(scale.dtype) / scale, codes, warmup), scale


def quantised_weight(
    weight: Float[Tensor, "*E F D"], warmup: Warmup | None
) -> tuple[Float[Tensor, "*E F D"], Float[Tensor, "*E"]]:
    """Codes -1, 0, 1 of each matrix as floats, and what they are multiplied by. The scale is a constant."""
    codes, scale = ternary_values(weight.detach())
    return straight_through(weight.to(scale.dtype) / scale[..., None, None], codes, warmup), scale


def ternary_linear(
    x: Float[Tensor, "*B D"], weight: Float[Tensor, "F D"], warmup: Warmup | None
) -> Float[Tensor, "*B F"]:
    """y = x~ W~^T, computed as (codes of x) (codes of W)^T * (scale of the row * scale of W).

    In fp32 the sums of codes are exact, and so equal the integers of inference bit for bit. The gradients are those
    of a plain product at the quantised operands: dL/dx = g W~, dL/dW = g^T x~."""
    rows, row_scale = quantised_rows(x, warmup)
    codes, scale = quantised_weight(weight, warmup)
    out = F.linear(rows, codes)
    return rescaled(out, row_scale * scale, x.dtype)


def ternary_experts_mm(
    rows: Float[Tensor, "R D"],
    weight: Float[Tensor, "E F D"],
    counts: Int[Tensor, " E"],
    num_matrices: int,
    warmup: Warmup | None,
) -> Float[Tensor, "R F"]:
    """The same for rows sorted by expert. Every matrix has its own scale: `num_matrices` lie one after the other in F
    (gate and up share their rows, which are quantised once)."""
    codes, row_scale = quantised_rows(rows, warmup)
    weight_codes, scale = quantised_weight(weight.unflatten(1, (num_matrices, -1)), warmup)  # scale (E, M)
    out = grouped_mm(codes, weight_codes.flatten(1, 2), counts)
    return rescaled(out, row_scale * spread(scale, counts, rows.shape[0], weight.shape[1]), rows.dtype)


def rescaled(sums: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of codes back in the units of the values: in the scale's precision, then `dtype`, or autocast's."""
    kept = sums.dtype if sums.is_floating_point() and sums.dtype != scale.dtype else dtype
    return (sums.to(scale.dtype) * scale).to(kept)
