"""The settings of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator
from torch import nn

from sparsemix import saved
from sparsemix.config import Config, ConfigError, without_later
from sparsemix.data.shards import DataConfig
from sparsemix.layers import MoDConfig
from sparsemix.machine import DtypeSetting, ThreadsSetting
from sparsemix.model import ModelConfig
from sparsemix.optim import Matrices, Moment, Optimizer, Rates, Schedule, build_optimizer


class TrainConfig(Config):
    """How a model is trained; the number of steps follows from the budget.

    dtype, compile, threads: `auto` is as machine.py says; what was picked is in the result and stays in a resumed run.
    recompute_blocks: keep what enters a block and its routing decisions, and compute the rest again in the backward
    pass: less memory for a forward pass more. keep_checkpoints: of a finished run too; its model is kept in any case,
    and moments take twice as much as weights."""

    budget_flops: float = Field(gt=0)
    lr: float = Field(default=3e-3, gt=0)
    rates: Rates = Rates()
    schedule: Schedule = "cosine"
    batch_tokens: int = Field(default=2048, ge=1)
    accumulation: int = Field(default=1, ge=1)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    optimizer: Matrices = "adamw"
    table_moment: Moment = "full"
    clip_norm: float = Field(default=1.0, gt=0)
    dtype: DtypeSetting = "auto"
    compile: bool | Literal["auto"] = "auto"
    threads: ThreadsSetting = None
    recompute_blocks: bool = False
    evals: int = Field(default=8, ge=0)
    eval_tokens: int = Field(default=16_384, ge=1)
    test_tokens: int | None = Field(default=None, ge=1)
    checkpoint_s: float = Field(default=60.0, ge=0)
    keep_checkpoints: bool = False

    @model_serializer(mode="wrap")
    def _named(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return without_later(self, dump(self), ("keep_checkpoints", "rates"))

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer that these settings ask for."""
        return build_optimizer(
            model, self.lr, self.weight_decay, matrices=self.optimizer, table_moment=self.table_moment, rates=self.rates
        )


class InitConfig(Config):
    """A saved model whose weights a run starts with; its fingerprint says which weights they must be."""

    folder: str
    fingerprint: str | None = None

    def check(self) -> None:
        """Raises ConfigError if the weights there are others, or gone."""
        found = saved.fingerprint(Path(self.folder))
        if self.fingerprint not in (None, found):
            raise ConfigError(
                f"init.fingerprint={self.fingerprint}: the weights in {self.folder} are now {found}; restore them, or "
                "start a new run"
            )


class RunConfig(Config):
    """Everything that decides a run: model, text, training, first weights, seed. Its hash names the run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    init: InitConfig | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_vocabulary(self) -> "RunConfig":
        if self.data.tokenizer is None and self.model.vocab_size != self.data.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} must equal data.vocab_size={self.data.vocab_size}"
            )
        return self

    @property
    def batch_size(self) -> int:
        """Sequences per step, over all micro-batches."""
        per_micro = max(1, round(self.train.batch_tokens / self.model.seq_len / self.train.accumulation))
        return per_micro * self.train.accumulation

    @property
    def step_flops(self) -> float:
        return 3.0 * self.model.cost().flops * self.batch_size

    def costs(self) -> dict[str, Any]:
        """What a token costs, by analysis of the settings: FLOPs by three conventions, parameters, bytes."""
        cost, T = self.model.cost(), self.model.seq_len
        items = {name: value / T for name, value in cost.items.items() if value}
        forward = cost.flops / T
        return {
            "flops_per_token": forward,
            "train_flops_per_token": 3 * forward,
            "flops_per_token_causal_half": forward - items.get("attention", 0.0) / 2,
            "flops_per_token_no_logits": forward - items["logits"],
            "cost_items": items,
            "params": cost.params,
            "active_params": cost.active_params,
            "bytes_per_token": cost.bytes,
            "outside_share": self.model.outside_flops() / cost.flops,
        }

    @property
    def still_falling(self) -> list[str]:
        """Blocks of Mixture-of-Depths whose capacity has not reached its goal when the budget is spent."""
        found = []
        for i, block in enumerate(self.model.blocks):
            if isinstance(block, MoDConfig) and block.anneal_steps > self.steps:
                found.append(f"model.blocks.{i}.anneal_steps={block.anneal_steps}")
        return found

    @property
    def steps(self) -> int:
        """Whole steps that the budget pays for, at the cost of the settings. Raises ConfigError if it pays for none."""
        steps = int(self.train.budget_flops / self.step_flops)
        if steps < 1:
            raise ConfigError(
                f"train.budget_flops={self.train.budget_flops:.3g} is less than one step ({self.step_flops:.3g} "
                "FLOPs); raise the budget or lower train.batch_tokens or the model's size"
            )
        return steps
