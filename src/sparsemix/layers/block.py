"""The pre-norm transformer block: mixer, then feed-forward."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.norm import RMS, NormConfig


class BlockConfig(LayerConfig):
    """y = mixer(norm x) + ffn(norm(x + mixer(norm x))), both norms of one kind."""

    kind: Literal["block"] = "block"
    mixer: LayerConfig
    ffn: LayerConfig
    norm: NormConfig = RMS

    def cost(self, d_model: int, seq_len: int) -> Cost:
        norms = Cost.of("linear", 0.0, 2 * self.norm.num_params(d_model))
        return norms + self.mixer.cost(d_model, seq_len) + self.ffn.cost(d_model, seq_len)

    def build(self, d_model: int) -> "Block":
        return Block(self, d_model)


class Block(Layer):
    """The update of one transformer block; the caller adds it to x."""

    def __init__(self, config: BlockConfig, d_model: int) -> None:
        super().__init__()
        self.mixer_norm = config.norm.build(d_model)
        self.mixer = config.mixer.build(d_model)
        self.ffn_norm = config.norm.build(d_model)
        self.ffn = config.ffn.build(d_model)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        mixed, mixer_aux = self.mixer(self.mixer_norm(x), ctx)
        fed, ffn_aux = self.ffn(self.ffn_norm(x + mixed), ctx)
        return mixed + fed, mixer_aux.under("mixer") | ffn_aux.under("ffn")
