"""From what Hugging Face's callers pass to what the library's layers take, and to the loss."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsemix.interop.hf_cache import SparsemixCache
from sparsemix.layers import Ctx
from sparsemix.model import LM
from sparsemix.ops.cross_entropy import NO_TARGET


def known_cache(cache: Any) -> SparsemixCache | None:
    """The cache, if it is the one that these models keep. Raises ValueError."""
    if cache is not None and not isinstance(cache, SparsemixCache):
        kind = type(cache).__name__
        raise ValueError(f"{kind} cannot hold ragged routed layers: leave it out, or pass one that was returned")
    return cache


def context(
    tokens: Int[Tensor, "B T"],
    mask: Tensor | None,
    positions: Int[Tensor, "b T"] | None,
    past: SparsemixCache | None,
    causal: bool,
) -> Ctx:
    """What the layers may know. Positions given without a mask start a new document wherever they do not count on.
    Raises ValueError for a mask of another shape."""
    B, T = tokens.shape
    if mask is not None:
        columns = T + (0 if past is None else past.get_seq_length())
        if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] not in (T, columns):
            shape = tuple(mask.shape)
            raise ValueError(f"attention_mask of shape {shape} must be ({B}, {columns}): 1 a token, 0 padding")
        mask = mask.bool()
    held = None if past is None else past.extend(mask, tokens.shape)
    valid = None if mask is None else mask[:, -T:]
    # An exported program does not know whether there is any padding, nor any second document.
    exporting = torch.compiler.is_exporting()
    # Without padding no layer needs a mask.
    valid = None if valid is None or (not exporting and bool(valid.all())) else valid
    doc_ids = None
    if positions is not None:
        positions = positions.expand(B, T)
        jumps = (positions - positions.roll(1, dims=1) != 1) & (torch.arange(T, device=positions.device) > 0)
        if mask is None and past is None and (exporting or bool(jumps.any())):
            doc_ids = jumps.cumsum(dim=1)
    elif past is None and valid is not None:
        positions = (valid.cumsum(dim=1) - 1).clamp_min(0)
    return Ctx(positions, doc_ids, valid, causal=causal, cache=held)


def shifted(labels: Int[Tensor, "B T"], mask: Tensor | None) -> Int[Tensor, "B T"]:
    """The label of the next token at every one; none at the last, nor where the next one is padding."""
    if mask is not None:
        labels = labels.masked_fill(~mask.bool(), NO_TARGET)
    return F.pad(labels, (0, 1), value=NO_TARGET)[:, 1:]


def loss_of(
    model: LM,
    x: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    valid: Tensor | None,
    auxiliary: Float[Tensor, ""] | None,
    num_items: int | Tensor | None,
) -> Float[Tensor, ""]:
    """Mean nats of the targets of real tokens plus the auxiliary losses; with num_items, times the share of the
    targets that are here."""
    if valid is not None:
        targets = targets.masked_fill(~valid, NO_TARGET)
    mean, _ = model.nats(x, targets)
    total = mean if auxiliary is None else mean + auxiliary
    return total if num_items is None else total * ((targets != NO_TARGET).sum().to(total.dtype) / num_items)
