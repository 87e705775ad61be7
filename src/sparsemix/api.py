"""The public entry points: layers, models, optimizers and costs from settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsemix.config import parse
from sparsemix.layers import Cost, Layer, LayerConfig, update
from sparsemix.layers.packed import pack_ternary
from sparsemix.machine import tune_cpu_allocator
from sparsemix.model import LM, ModelConfig
from sparsemix.optim import build_optimizer
from sparsemix.trained import load

__all__ = [
    "build_layer",
    "build_model",
    "build_optimizer",
    "layer_cost",
    "load_model",
    "pack_ternary",
    "tune_cpu_allocator",
    "update",
]


def build_layer(config: LayerConfig | Mapping[str, Any], d_model: int) -> Layer:
    """A layer (B, T, d_model) -> (update of the same shape, Aux). Raises ConfigError."""
    return _layer(config).build(d_model)


def layer_cost(config: LayerConfig | Mapping[str, Any], d_model: int, seq_len: int) -> Cost:
    """FLOPs, parameters and bytes of a layer on one sequence, without building it. Raises ConfigError."""
    return _layer(config).cost(d_model, seq_len)


def build_model(config: ModelConfig | Mapping[str, Any], seed: int = 0) -> LM:
    """A language model with parameters drawn from `seed`. Raises ConfigError."""
    return (config if isinstance(config, ModelConfig) else parse(ModelConfig, config)).build(seed)


def load_model(folder: Path | str) -> LM:
    """The trained model of a run's folder or of an exported one, in evaluation mode. Raises ConfigError."""
    return load(Path(folder)).model


def _layer(config: LayerConfig | Mapping[str, Any]) -> LayerConfig:
    return config if isinstance(config, LayerConfig) else parse(LayerConfig, config)
