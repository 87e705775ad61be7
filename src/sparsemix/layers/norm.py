"""Norms over the last axis, and the setting that picks one."""

from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field, model_serializer, model_validator
from torch import Tensor, nn

from sparsemix.config import Config, named

EPS = 1e-6
NORMS = ("rms", "layer")


class NormConfig(Config):
    """A plain name, such as `layer`, stands for `{kind: layer}`. `rms` has a gain, `layer` a gain and a bias."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = Field(default=EPS, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, raw: Any) -> Any:
        return named("kind", raw, NORMS)

    @model_serializer(mode="wrap")
    def _short(self, handler: Any) -> str | dict[str, Any]:
        return self.kind if self.eps == EPS else handler(self)

    def num_params(self, width: int) -> int:
        return width if self.kind == "rms" else 2 * width

    def build(self, width: int) -> "RMSNorm | LayerNorm":
        return RMSNorm(width, self.eps) if self.kind == "rms" else LayerNorm(width, self.eps)


RMS = NormConfig()


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last axis, in the precision of the weight. Source: arXiv:1910.07467."""

    def __init__(self, d_model: int, eps: float = EPS) -> None:
        super().__init__(d_model, eps=eps)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / std(x) * weight + bias, over the last axis, in the precision of the weight. Source:
    arXiv:1607.06450."""

    def __init__(self, d_model: int, eps: float = EPS) -> None:
        super().__init__(d_model, eps=eps)

    def forward(self, input: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)
