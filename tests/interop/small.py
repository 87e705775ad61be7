"""Decoders of three small blocks in fp64, away from special values, and tokens for them."""

import torch

from sparsemix.config import parse
from sparsemix.data import Batch
from sparsemix.model import ModelConfig

D, F, V, T = 12, 36, 37, 21
ATTENTION = {"kind": "attention", "num_heads": 3}


def decoder(blocks=3, seed=1, **dense):
    block = {"kind": "block", "mixer": ATTENTION, "ffn": {"kind": "dense", "d_ff": F, **dense}}
    return shaken({"count": blocks, "each": block}, seed)


def shaken(blocks, seed=1, **settings):
    config = parse(ModelConfig, {"d_model": D, "vocab_size": V, "seq_len": T, "blocks": blocks, **settings})
    model = config.build(seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(rows=3):
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(5))


def batch():
    drawn = tokens()
    return Batch(drawn, drawn, torch.arange(T).expand_as(drawn), torch.zeros_like(drawn))
