"""Muon for matrices and for stacks of them, such as the experts of a layer."""

from collections.abc import MutableMapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Keller Jordan's coefficients, torch.optim.Muon's defaults: their slope at zero is steep, singular values end in about
# [0.7, 1.2] after five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
SMALLEST_NORM = 1e-7
MOMENTUM = 0.95


def orthogonalised(x: Float[Tensor, "*E A B"], dtype: torch.dtype | None = None) -> Float[Tensor, "*E A B"]:
    """U V^T, nearly, of every matrix x = U S V^T of the stack: x <- a x + (b G + c G^2) x with G = x x^T, five times.

    In bf16 where the processor multiplies it natively, else in fp32."""
    a, b, c = COEFFICIENTS
    dtype = dtype or (torch.bfloat16 if x.is_cuda or torch.cpu._is_avx512_bf16_supported() else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    stack = x.to(dtype).reshape(-1, *x.shape[-2:])
    stack = stack.mT if tall else stack
    stack = stack / torch.linalg.matrix_norm(stack, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(STEPS):
        gram = stack @ stack.mT
        stack = torch.baddbmm(stack, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), stack, beta=a)
    return (stack.mT if tall else stack).reshape(x.shape)


def step(group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
    """One step of Muon with Nesterov's momentum on the group's parameters that have a gradient.

    The rate is 0.2 sqrt(max(A, B)) times the group's, which gives updates the size of AdamW's, so that one learning
    rate and decay serve both (arXiv:2502.16982, section 2.2). An expert that no token reached moves on along its
    momentum, whose size does not count."""
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        slots = state[parameter]
        if not slots:
            slots["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = slots["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
        update = orthogonalised(parameter.grad.lerp(momentum, MOMENTUM))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape[-2:]) ** 0.5)
