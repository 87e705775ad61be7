"""A language model without its head: AutoModel."""

from typing import Any, NoReturn

from jaxtyping import Int
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import AutoModel
from transformers.utils.generic import can_return_tuple

from sparsemix.interop.hf_config import SparsemixConfig
from sparsemix.interop.hf_model import CACHE, SparsemixForCausalLM
from sparsemix.model import LM


class SparsemixModel(SparsemixForCausalLM):
    """What the head would read, (B, T, d_model), as `last_hidden_state`. Folders of SparsemixForCausalLM load into it
    and, with tied embeddings, the other way round. Raises ValueError for what needs a head."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]  # noqa: RUF012  (transformers reads and types it so)

    def __init__(self, config: SparsemixConfig, model: LM | None = None) -> None:
        super().__init__(config, model)
        self.model.lm_head = nn.Identity()  # type: ignore[assignment]

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def get_output_embeddings(self) -> None:
        return None

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("this model has no head to generate with: load it by AutoModelForCausalLM")

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "b T"] | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As SparsemixForCausalLM's, but for labels and logits."""
        if given := sorted({"labels", "shift_labels"} & kwargs.keys()):
            raise ValueError(f"{given[0]}: a loss needs a head; load the model by AutoModelForCausalLM")
        kwargs["return_dict"] = True
        out = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        return MoeModelOutputWithPast(
            last_hidden_state=out.logits,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
            **{CACHE: out.get(CACHE)},
        )


AutoModel.register(SparsemixConfig, SparsemixModel, exist_ok=True)
