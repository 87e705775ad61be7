"""The runs that are compared."""

from sparsemix.data import DataConfig
from sparsemix.layers import PEERConfig
from sparsemix.sweep.arms import Arm, backbone, run_config


def test_an_arm_may_size_its_layer_itself():
    def sized(dense, d_model):
        return {"num_experts": 256, "num_heads": 2, "top_k": 4, "d_key": d_model // 4}

    for width in (16, 64):
        raw = backbone("peer-dense:300k", width=width)
        config = run_config(Arm("PEER", "peer", sized=sized), raw, DataConfig(vocab_size=1024), 1e11)
        layers = [block.ffn for block in config.model.blocks if block.kind == "block"]
        peer = [layer for layer in layers if isinstance(layer, PEERConfig)]
        assert [(p.num_experts, p.d_key) for p in peer] == [(256, width // 4)]
