"""The pre-norm transformer block: mixer, then feed-forward."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig


class BlockConfig(LayerConfig):
    """y = mixer(norm x) + ffn(norm(x + mixer(norm x))), both norms RMSNorm."""

    kind: Literal["block"] = "block"
    mixer: LayerConfig
    ffn: LayerConfig

    def cost(self, d_model: int, seq_len: int) -> Cost:
        norms = Cost.of("linear", 0.0, 2 * d_model)
        return norms + self.mixer.cost(d_model, seq_len) + self.ffn.cost(d_model, seq_len)

    def build(self, d_model: int) -> "Block":
        return Block(self, d_model)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last axis, in the precision of the weight. Source: arXiv:1910.07467."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=1e-6)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Block(Layer):
    """The update of one transformer block; the caller adds it to x."""

    def __init__(self, config: BlockConfig, d_model: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model)
        self.mixer = config.mixer.build(d_model)
        self.ffn_norm = RMSNorm(d_model)
        self.ffn = config.ffn.build(d_model)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        mixed, mixer_aux = self.mixer(self.mixer_norm(x), ctx)
        fed, ffn_aux = self.ffn(self.ffn_norm(x + mixed), ctx)
        return mixed + fed, mixer_aux.under("mixer") | ffn_aux.under("ffn")
