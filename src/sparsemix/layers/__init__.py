"""Mechanisms: one file each. The imports below are the registry: importing a file adds its kind."""

from sparsemix.layers.attention import AttentionConfig
from sparsemix.layers.base import Aux, Cost, Ctx, Layer, LayerConfig
from sparsemix.layers.beside import BesideConfig
from sparsemix.layers.block import BlockConfig
from sparsemix.layers.cache import Cache
from sparsemix.layers.dense import DenseConfig
from sparsemix.layers.expert_choice import ExpertChoiceConfig
from sparsemix.layers.mh_moe import MHMoEConfig
from sparsemix.layers.mod import MoDConfig
from sparsemix.layers.mode import MoDEConfig
from sparsemix.layers.moe import MoEConfig
from sparsemix.layers.peer import PEERConfig
from sparsemix.layers.pkm import PKMConfig
from sparsemix.layers.running import rank_means, update

__all__ = [
    "AttentionConfig",
    "Aux",
    "BesideConfig",
    "BlockConfig",
    "Cache",
    "Cost",
    "Ctx",
    "DenseConfig",
    "ExpertChoiceConfig",
    "Layer",
    "LayerConfig",
    "MHMoEConfig",
    "MoDConfig",
    "MoDEConfig",
    "MoEConfig",
    "PEERConfig",
    "PKMConfig",
    "rank_means",
    "update",
]
