"""Activations and their slopes inside Triton kernels.

Kernels call kernels, which the interpreter finds only if the tests' type checks leave them bare: `no_type_check`."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def sigmoid(z):
    """1 / (1 + exp(-z)), through the exponential that cannot overflow."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z < 0, small, 1.0) / (1.0 + small)


@triton.jit
@no_type_check
def bent(z):
    """(1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2, whose cube stays finite: from 15 on it is 0 or 1 in fp32."""
    near = tl.maximum(tl.minimum(z, 15.0), -15.0)
    return sigmoid(1.5957691216057308 * (near + 0.044715 * near * near * near))


@triton.jit
@no_type_check
def activated(z, act: tl.constexpr):
    """act(z), act one of gelu, gelu_tanh, silu, relu."""
    if act == "gelu":
        y = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif act == "gelu_tanh":
        y = z * bent(z)
    elif act == "silu":
        y = z * sigmoid(z)
    else:
        # Not maximum, which loses NaN.
        y = tl.where(z < 0, 0.0, z)
    return y


@triton.jit
@no_type_check
def slope(z, act: tl.constexpr):
    """d act(z) / dz; 0 at 0 for relu, as torch has it."""
    if act == "gelu":
        # Beyond 15 the density is 0 in fp32, before the square overflows.
        near = tl.minimum(tl.abs(z), 15.0)
        y = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * 0.3989422804014327 * tl.exp(-0.5 * near * near)
    elif act == "gelu_tanh":
        s, near = bent(z), tl.minimum(tl.abs(z), 15.0)
        y = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    elif act == "silu":
        s = sigmoid(z)
        y = s * (1.0 + z * (1.0 - s))
    else:
        y = tl.where(z > 0, 1.0, 0.0)
    return y
