"""The readable form of the op, over whole logits, and of its step over one chunk of them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    logits = hidden @ weight.T
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    known = targets != -100
    picked = log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    nats = torch.where(known, -picked, 0.0)
    return nats.sum() / known.sum().clamp_min(1), nats


def nats(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], share: Float[Tensor, ""] | None
) -> Float[Tensor, " N"]:
    """-log p_target with p = softmax(logits); with `share` the logits become share (p - onehot(target)). 0 both where
    there is no target."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    out = F.nll_loss(log_p, targets, reduction="none")
    if share is not None:
        known, at = targets != -100, targets.clamp_min(0)[:, None]
        slope = torch.where(known, share, 0.0)[:, None]
        logits.copy_(log_p.exp_().mul_(slope).scatter_add_(1, at, -slope))
    return out
