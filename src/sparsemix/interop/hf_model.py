"""A language model as Hugging Face's own kind: AutoModelForCausalLM, generate, Trainer."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils.generic import can_return_tuple

from sparsemix.durable import SEAL
from sparsemix.interop.hf_cache import SparsemixCache
from sparsemix.interop.hf_config import SparsemixConfig
from sparsemix.interop.hf_inputs import context, known_cache, loss_of, shifted
from sparsemix.interop.hf_remote import AUTO_MAP, FILES
from sparsemix.interop.hf_steps import RunningState, settle
from sparsemix.layers import Aux, Ctx
from sparsemix.layers.product_keys import RENAMED
from sparsemix.model import LM, BlockRunner, after
from sparsemix.ops.transforms import transformed
from sparsemix.step import recomputed

# How this version of transformers names the cache in outputs and in `generate`: past_key_values before 5.24.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class SparsemixForCausalLM(PreTrainedModel, GenerationMixin):
    """`model` is the library's LM, drawn from the seed that torch was given last. Routing is causal except in training
    with labels. Running state moves by itself in training, once per optimizer step."""

    config_class = SparsemixConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The stream is added up across blocks, and the head may be the embedding: one device holds all.
    _no_split_modules = ["LM"]  # noqa: RUF012  (transformers reads and types it so)

    def __init__(self, config: SparsemixConfig, model: LM | None = None) -> None:
        super().__init__(config)
        self.model = config.model_settings.build(torch.initial_seed()) if model is None else model
        self.gradient_checkpointing = False
        self.running = RunningState()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            # On the meta device nothing was drawn yet.
            tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
        self.post_init()

    @classmethod
    def wrap(cls, model: LM, **settings: Any) -> "SparsemixForCausalLM":
        """The same model, not a copy; `settings` are the configuration's own, such as eos_token_id."""
        return cls(SparsemixConfig(settings=model.config.model_dump(mode="json"), **settings), model)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint lacks. transformers guards torch.nn.init meanwhile: what was loaded stays."""
        mine = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if all(getattr(tensor, "_is_hf_initialized", False) for tensor in mine):
            return
        for buffer in module.buffers(recurse=False):
            if not getattr(buffer, "_is_hf_initialized", False):
                buffer.zero_()
        if isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            nn.init.normal_(module.weight, std=0.02)  # type: ignore[arg-type]
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def train(self, mode: bool = True) -> "SparsemixForCausalLM":
        if not mode:
            self.running.show(self.model)
            # Loading ends with eval(), and wrote the buffers without a word to their modules.
            settle(self.model)
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.running.show(self.model)
        return super().state_dict(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.embed = value
        self.model.config = self.model.config.replace(vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embedding."""
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.lm_head = new_embeddings

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers does, and the two files that trust_remote_code=True runs."""
        self.config.auto_map = dict(AUTO_MAP)
        # Checksums of what stood there before are of no use to what is written now.
        (Path(save_directory) / SEAL).unlink(missing_ok=True)
        # Today's names, whichever the weights were read under.
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})
        for name, text in FILES.items():
            (Path(save_directory) / name).write_text(text, encoding="utf-8")

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        if (exit_at := generation_config.assistant_early_exit) is not None:
            raise ValueError(
                f"assistant_early_exit={exit_at} needs a head after every block, which these models do not learn; "
                "leave it out, or give an assistant_model"
            )
        asked = generation_config.cache_implementation
        # The last is what assisted decoding asks for before transformers 5.24: a cache that forgets nothing by itself.
        if asked not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f"cache_implementation={asked!r} cannot hold ragged routed layers; leave it out")
        if (given := known_cache(model_kwargs.get(CACHE))) is not None:
            given._is_user_defined = True  # type: ignore[attr-defined]
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = SparsemixCache()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Recompute blocks in the backward pass, but for their routing decisions. Raises ValueError for other ways."""
        asked = getattr(gradient_checkpointing_func, "keywords", {})
        if asked.get("use_reentrant") or every_n_layers != 1:
            raise ValueError("checkpointing recomputes every block and needs use_reentrant=False; leave the rest out")
        self.gradient_checkpointing = enable

    def _runner(self, states: list[Tensor] | None) -> BlockRunner:
        """How blocks are run; with `states`, what enters each one is appended there."""
        run = recomputed if self.gradient_checkpointing and self.training else after
        if states is None:
            return run

        def recording(block: nn.Module, x: Tensor, ctx: Ctx) -> tuple[Tensor, Aux]:
            states.append(x)
            return run(block, x, ctx)

        return recording

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "b T"] | None = None,
        past_key_values: SparsemixCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        cache: SparsemixCache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits, and with labels (of the same tokens; or shift_labels, of the next ones) the loss.

        attention_mask (B, T), or (B, S + T) with a cache of S columns, pads on any side. In training the loss is the
        cross-entropy plus the layers' auxiliary losses, in evaluation the cross-entropy alone; `aux_loss` is their sum.
        With num_items_in_batch the losses of a step's micro-batches add up to the step's, each auxiliary one counting
        by its share of the tokens. Training with labels gives no logits, which then never exist at a time, unless
        skip_logits=False. router_logits: (n, E) of every router that ran, in order, of the tokens that it saw.
        Raises ValueError for what is not supported."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("inputs_embeds is not supported: pass input_ids")
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("output_attentions is not supported: attention weights are never formed")
        if getattr(self, "_is_replica", False):
            raise ValueError("nn.DataParallel loses running state: launch with torchrun, or show it one GPU")
        past = known_cache(past_key_values if cache is None else cache)
        exporting = torch.compiler.is_exporting()
        if exporting and use_cache:
            raise ValueError("use_cache=True: an exported program keeps no cache; leave it out")
        # Not in the signature, from which a Trainer reads which labels it must be given.
        targets = kwargs.get("shift_labels")
        if targets is None and labels is not None:
            targets = shifted(labels, attention_mask)
        if targets is not None and past is not None:
            raise ValueError("labels cannot be combined with a cache: leave one of them out")
        # Positions without a mask may be those of several documents in a row, which nothing can continue.
        continues = not self.training and targets is None and (position_ids is None or attention_mask is not None)
        if past is None and continues and not exporting and chosen(use_cache, self.config.use_cache):
            past = SparsemixCache()
        ctx = context(input_ids, attention_mask, position_ids, past, causal=not self.training or targets is None)
        ctx = self.model.placed(input_ids, ctx)
        states = [] if chosen(output_hidden_states, self.config.output_hidden_states) else None
        routers = chosen(output_router_logits, self.config.output_router_logits)
        # What torch.func differentiates has no state, and its tensors end with its call.
        observes = self.training and torch.is_grad_enabled() and not transformed()
        if observes:
            self.running.begin(self.model)
        x, aux = self.model.hidden(input_ids, ctx._replace(logits=routers), self._runner(states))
        if observes:
            self.running.take(self.model, aux.stats)
        loss, auxiliary = None, sum(aux.losses.values()) if aux.losses else None
        if targets is not None:
            added = auxiliary if self.training else None
            loss = loss_of(self.model, x, targets, ctx.valid, added, num_items_in_batch)  # type: ignore[arg-type]
        logits = None
        if targets is None or not chosen(skip_logits, self.training):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.logits(x[:, keep])
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=auxiliary,  # type: ignore[arg-type]
            logits=logits,
            hidden_states=None if states is None else (*states, x),
            router_logits=tuple(aux.logits.values()) if routers else None,  # type: ignore[arg-type]
            **{CACHE: past},  # type: ignore[arg-type]
        )


def chosen(argument: bool | None, default: bool | None) -> bool:
    return bool(default if argument is None else argument)


register_checkpoint_conversion_mapping(
    SparsemixConfig.model_type,
    [WeightRenaming(rf"\.{old}$", f".{new}") for old, new in RENAMED.items()],
    overwrite=True,
)
AutoModelForCausalLM.register(SparsemixConfig, SparsemixForCausalLM, exist_ok=True)
