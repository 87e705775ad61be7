"""Cross-entropy over a vocabulary from hidden states; the logits of all tokens never exist at a time."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops.cross_entropy import reference
from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.precision import autocast
from sparsemix.ops.transforms import transformed

SOURCE = Path(__file__).with_name("native.c")
KERNELS = Kernels("cross_entropy", source=SOURCE, triton=True)
NO_TARGET = -100
# Logits that exist at a time: 16 MiB in fp32, which a CPU's last cache holds; a GPU needs more rows to be busy.
MAX_LOGITS = {"cpu": 2**22, "cuda": 2**25}


def cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"], impl: str = "auto"
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """(mean, nats): nats_n = log sum_v exp(w_v . h_n) - w_t . h_n for t = targets_n, 0 where that is -100; the mean is
    over the others, 0 without any. In at least fp32; the logits are in the operands' dtype, or in autocast's.

    Differentiable, once, through the mean; nats carry no gradient. Where a gradient will be asked for, the forward
    pass forms it with each chunk of logits and backward only scales it, so nothing is computed twice: three products
    as in the plain form, and V D more numbers kept instead of 2 N V. Sources: arXiv:2410.10989 (gradients in the
    forward pass, chunks of tokens), arXiv:2411.09009 (logits that are never all in memory)."""
    dtype = torch.promote_types(*(x.dtype for x in autocast(hidden.detach()[:0], weight.detach()[:0])))
    if transformed():
        mean, nats = reference.cross_entropy(hidden.to(dtype), weight.to(dtype), targets)
        return mean, nats.detach()
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    mean, nats, *_ = torch.ops.sparsemix.cross_entropy(hidden, weight, targets, dtype, learns, impl)
    return mean, nats.detach()


@torch.library.custom_op("sparsemix::cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, learns: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Bytes are labels in PyTorch too.
    targets = targets.long() if targets.dtype == torch.uint8 else targets
    check_op("cross_entropy", hidden, weight, targets)
    rows, table = hidden.to(dtype), weight.to(dtype)
    impl = KERNELS.pick(impl, rows, table)
    exact = torch.promote_types(dtype, torch.float32)
    (N, D), V = rows.shape, len(table)
    if not rows.is_cuda:
        _known_ids(targets, V)
    share = 1.0 / (targets != NO_TARGET).sum().clamp_min(1).to(exact)
    nats = rows.new_empty(N, dtype=exact)
    d_hidden, d_weight = hidden.new_empty(hidden.shape if learns else 0), weight.new_empty(0)
    summed = torch.zeros(V, D, dtype=exact, device=rows.device) if learns else None
    step = max(1, MAX_LOGITS["cuda" if rows.is_cuda else "cpu"] // V)
    for part in (slice(start, start + step) for start in range(0, N, step)):
        logits = rows[part] @ table.T  # (step, V)
        nats[part] = _nats(logits, targets[part].contiguous(), share if learns else None, impl)
        if summed is not None:  # `logits` are now their own gradient
            d_hidden[part] = logits @ table
            summed = summed.addmm_(logits.T, rows[part]) if dtype == exact else summed.add_(logits.T @ rows[part])
    if summed is not None:
        d_weight = summed.to(weight.dtype)
    return nats.sum() * share, nats, d_hidden, d_weight


def _known_ids(targets: Tensor, V: int) -> None:
    """Raises IndexError. A GPU would have to be waited for."""
    if bool(((targets != NO_TARGET) & ((targets < 0) | (targets >= V))).any()):
        raise IndexError(f"a target is none of the ids 0 to {V - 1}, nor {NO_TARGET} (no target)")


def _nats(logits: Tensor, targets: Tensor, share: Tensor | None, impl: str) -> Tensor:
    """-log softmax(logits)_target of every row, in at least fp32. With `share` the logits become the gradient of
    share * sum of nats."""
    if impl == "native":
        nats = logits.new_empty(len(logits), dtype=torch.float32)
        name = "nats_bf16" if logits.dtype == torch.bfloat16 else "nats_f32"
        factor = None if share is None else share.float()
        KERNELS.call(name, logits, targets, factor, nats, *logits.shape)
        return nats
    if impl == "triton":
        from sparsemix.ops.cross_entropy import triton

        return triton.nats(logits, targets, share)
    return reference.nats(logits, targets, share)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, learns: bool, impl: str):
    exact = torch.promote_types(dtype, torch.float32)
    d_hidden, d_weight = (x.new_empty(x.shape if learns else 0) for x in (hidden, weight))
    nats = hidden.new_empty(hidden.shape[0], dtype=exact)
    return nats.new_empty(()), nats, d_hidden, d_weight


def _save(ctx, inputs, output) -> None:
    ctx.learns = inputs[4]
    ctx.save_for_backward(*output[2:])


def _backward(ctx, d_mean: Tensor, *_):
    assert ctx.learns, "asked for a gradient that was not announced"
    d_hidden, d_weight = ctx.saved_tensors
    d_hidden = d_mean * d_hidden if ctx.needs_input_grad[0] else None
    return d_hidden, d_mean * d_weight if ctx.needs_input_grad[1] else None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.sparsemix.cross_entropy)
def _flops(hidden_shape, weight_shape, targets_shape, dtype, learns, *args, **kwargs) -> int:
    return 2 * hidden_shape[0] * weight_shape[0] * weight_shape[1] * (3 if learns else 1)
