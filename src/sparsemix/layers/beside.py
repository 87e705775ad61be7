"""Two layers side by side: what was there, and what was added to it."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig


class BesideConfig(LayerConfig):
    """y = kept(x) + added(x). A converted model starts so: a layer whose output starts at 0 is added to a feed-forward
    that is kept."""

    kind: Literal["beside"] = "beside"
    kept: LayerConfig
    added: LayerConfig

    def cost(self, d_model: int, seq_len: int) -> Cost:
        return self.kept.cost(d_model, seq_len) + self.added.cost(d_model, seq_len)

    def build(self, d_model: int) -> "Beside":
        return Beside(self, d_model)


class Beside(Layer):
    """The sum of both layers' updates of the same tokens."""

    def __init__(self, config: BesideConfig, d_model: int) -> None:
        super().__init__()
        self.kept = config.kept.build(d_model)
        self.added = config.added.build(d_model)

    def forward(self, x: Float[Tensor, "B T D"], ctx: Ctx | None = None) -> tuple[Float[Tensor, "B T D"], Aux]:
        ctx = ctx or self.default_ctx()
        kept, kept_aux = self.kept(x, ctx)
        added, added_aux = self.added(x, ctx)
        return kept + added, kept_aux.under("kept") | added_aux.under("added")
