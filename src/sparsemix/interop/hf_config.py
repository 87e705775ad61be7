"""A model's settings as a Hugging Face configuration, under the names that its tools look for."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from sparsemix import __version__
from sparsemix.config import ConfigError, parse
from sparsemix.model import ModelConfig
from sparsemix.saved import FORMAT, FORMATS


class SparsemixConfig(PreTrainedConfig):
    """`settings` are a ModelConfig's, written out in full; the usual names (hidden_size, num_hidden_layers, ...) read
    from them. A name that means nothing for a model, such as num_local_experts without experts, is no attribute.

    Raises ConfigError: settings that are none, or of another version of the library."""

    model_type = "sparsemix"
    # What a Trainer must not gather as if it were logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "aux_loss", "router_logits"]

    settings: dict | None = None
    format: int = FORMAT
    sparsemix_version: str | None = None
    use_cache: bool = True
    output_router_logits: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format not in FORMATS:
            wrote = self.sparsemix_version or "another version"
            raise ConfigError(
                f"format={self.format} must be at most {FORMAT}, which this version ({__version__}) reads; "
                f"it was written by {wrote}: install that one"
            )
        if self.settings is not None:
            self.settings = parse(ModelConfig, self.settings).model_dump(mode="json")
        self.format, self.sparsemix_version = FORMAT, __version__
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ConfigError for a name that follows from the settings; transformers would print all of them."""
        own = vars(SparsemixConfig).get(name)
        if isinstance(own, property) and own.fset is None:
            raise ConfigError(f"{name}={value} cannot be set: it follows from `settings`; change it there")
        super().__setattr__(name, value)

    @property
    def model_settings(self) -> ModelConfig:
        """The settings as the library's own type. Raises ConfigError without any."""
        if self.settings is None:
            raise ConfigError("settings is missing: give SparsemixConfig(settings={...}), a model's settings")
        return parse(ModelConfig, self.settings)

    @property
    def vocab_size(self) -> int:
        return self._setting("vocab_size")

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        # transformers sets it when embeddings are resized.
        self.settings = {**(self.settings or {}), "vocab_size": value}

    @property
    def hidden_size(self) -> int:
        return self._setting("d_model")

    @property
    def max_position_embeddings(self) -> int:
        return self._setting("seq_len")

    @property
    def num_hidden_layers(self) -> int:
        return len(self._setting("blocks"))

    @property
    def tie_word_embeddings(self) -> bool:
        return (self.settings or {}).get("tie_embeddings", True)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        changed = {**(self.settings or {}), "tie_embeddings": value}
        self.settings = changed if self.settings is None else parse(ModelConfig, changed).model_dump(mode="json")

    @property
    def num_attention_heads(self) -> int:
        return self._first("num_attention_heads", "attention")["num_heads"]

    @property
    def num_key_value_heads(self) -> int:
        attention = self._first("num_key_value_heads", "attention")
        return attention["num_kv_heads"] or attention["num_heads"]

    @property
    def intermediate_size(self) -> int:
        return self._first("intermediate_size", "dense")["d_ff"]

    @property
    def num_local_experts(self) -> int:
        """Experts of the first layer that has any."""
        return self._experts("num_local_experts")["num_experts"]

    @property
    def num_experts(self) -> int:
        return self._experts("num_experts")["num_experts"]

    @property
    def num_experts_per_tok(self) -> int:
        """Experts that a token picks there, over all of PEER's heads."""
        layer = self._experts("num_experts_per_tok")
        return layer["top_k"] * (layer["num_heads"] if layer["kind"] == "peer" else 1)

    @property
    def router_aux_loss_coef(self) -> float:
        """The weight of the balance loss there; every layer has its own."""
        return self._experts("router_aux_loss_coef")["balance_weight"]

    def _setting(self, name: str) -> Any:
        if self.settings is None:
            raise AttributeError(f"a configuration without settings has no {name}")
        return self.settings[name]

    def _first(self, asked: str, *kinds: str) -> Mapping[str, Any]:
        for layer in layers_of(self.settings):
            if layer["kind"] in kinds:
                return layer
        raise AttributeError(f"no layer of this model gives it a meaning: {asked}")

    def _experts(self, asked: str) -> Mapping[str, Any]:
        wanted = {"num_experts_per_tok": "top_k", "router_aux_loss_coef": "balance_weight"}.get(asked, "num_experts")
        for layer in layers_of(self.settings):
            if "num_experts" in layer and wanted in layer:
                return layer
        raise AttributeError(f"no layer of this model gives it a meaning: {asked}")


def layers_of(node: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of every layer inside, outer ones first."""
    if isinstance(node, Mapping):
        if "kind" in node:
            yield node
        for value in node.values():
            yield from layers_of(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from layers_of(value)


AutoConfig.register(SparsemixConfig.model_type, SparsemixConfig, exist_ok=True)
