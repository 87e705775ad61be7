"""Small fp64 models as Hugging Face's classes, with every parameter away from its special values."""

import torch

from sparsemix.interop.hf import SparsemixConfig, SparsemixForCausalLM
from tiny import BLOCKS, MODE, D, T, V, block, mod

MODELS = {name: BLOCKS[name] for name in ("dense", "moe", "peer", "mod", "threshold", "nested")} | {
    "mod_mode": [block(MODE), mod(block(MODE), capacity=0.5)],
    "untied": BLOCKS["dense"],
}
# Settings of the model as a whole.
WHOLE = {"untied": {"tie_embeddings": False, "learned_positions": 4 * T}}
LENGTHS = (5, 1, 9, 3)


def settings(name, **changes):
    blocks = MODELS.get(name, BLOCKS.get(name))
    return {"d_model": D, "vocab_size": V, "seq_len": T, "blocks": blocks} | WHOLE.get(name, {}) | changes


def hf_model(name, seed=0, **changes):
    """In evaluation mode, its running state observed once."""
    torch.manual_seed(seed)
    model = SparsemixForCausalLM(SparsemixConfig(settings=settings(name, **changes))).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randint(V, (4, T))
    model(tokens, labels=tokens)
    return model.eval()


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (n,), generator=generator) for n in LENGTHS]


def padded(several, side="left"):
    """(input_ids, attention_mask) of a batch."""
    longest = max(map(len, several))
    ids, mask = (
        torch.zeros(len(several), longest, dtype=torch.long),
        torch.zeros(len(several), longest, dtype=torch.long),
    )
    for b, sequence in enumerate(several):
        place = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids[b, place], mask[b, place] = sequence, 1
    return ids, mask
