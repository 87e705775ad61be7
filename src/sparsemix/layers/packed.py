"""BitNet b1.58 at inference: two bits a weight, in memory and in the state dict, and integer products."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemix.config import ConfigError
from sparsemix.layers.linear import Experts, Linear, feed_experts, num_matrices
from sparsemix.layers.ternary import Warmup
from sparsemix.ops.ternary_mm import quantised_grouped_mm, quantised_mm, ternary
from sparsemix.ops.ternary_mm.pack import hf_from_rows, pack_rows, rows_from_hf


def pack_ternary(module: nn.Module) -> nn.Module:
    """`module` with every ternary Linear and expert bank inside it replaced, in place, by codes and scales; for
    inference only, as nothing trainable is left of them.

    The result equals the forward that was trained: its sums of codes bit for bit. `saved` writes and reads it. Raises
    ConfigError if nothing is ternary or a warm-up is not over."""
    for name, layer in module.named_modules():
        if isinstance(layer, Warmup) and int(layer.step) < layer.steps:
            raise ConfigError(
                f"{name}.step={int(layer.step)} is less than warmup_steps={layer.steps}: the layer is still partly "
                "float; train on, or build it without a warm-up"
            )
    return with_packed_layers(module)


def with_packed_layers(module: nn.Module) -> nn.Module:
    """`pack_ternary` of a module whose numbers do not count yet: a packed state dict is loaded into it. Raises
    ConfigError if nothing is ternary."""
    packed = _packed(module)
    if packed is not module:
        return packed
    found = False
    for owner in list(module.modules()):
        for name, child in owner.named_children():
            if (other := _packed(child)) is not child:
                setattr(owner, name, other)
                found = True
    if not found:
        raise ConfigError("precision=float everywhere in this module: nothing to pack; build it with precision=ternary")
    return module


def is_packed(names: Iterable[str]) -> bool:
    """Does a state dict of these names hold packed weights?"""
    return any(name.endswith(".codes") for name in names)


def _packed(module: nn.Module) -> nn.Module:
    if isinstance(module, Linear) and module.precision.ternary:
        return PackedLinear(module)
    if isinstance(module, Experts) and module.precision.ternary:
        return PackedExperts(module)
    return module


class TernaryWeight(nn.Module):
    """W = codes * scale. `codes` uint8 holds four weights in a byte (ops/ternary_mm/pack.py): in memory
    (..., F, D / 4), as the kernels read it; in the state dict (..., F / 4, D), as Hugging Face does. `scale` fp32, one
    a matrix, multiplies."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Float[Tensor, "*E F D"], num_matrices: int = 1) -> None:
        """`num_matrices` lie one after the other in F, each with its own scale: scale is (..., num_matrices)."""
        super().__init__()
        *stack, self.d_out, self.d_in = weight.shape
        # One at a time: what quantising needs beside the result is small.
        each = [_quantised(w, num_matrices) for w in weight.detach().reshape(-1, self.d_out, self.d_in)]
        self.register_buffer("codes", torch.stack([codes for codes, _ in each]).view(*stack, self.d_out, -1))
        self.register_buffer("scale", torch.stack([scale for _, scale in each]).view(*stack, num_matrices))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TernaryWeight":
        """Moves like any module; but `model.bfloat16()` leaves the scale in fp32, as it is one number a matrix."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = self.scale.float() if scale.is_meta else scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = hf_from_rows(self.codes, self.d_in)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}codes"
        packed = state_dict.get(name)
        if packed is not None:
            # The caller's dict must stay as it was read.
            state_dict = dict(state_dict)
            wanted = (*self.codes.shape[:-2], -(-self.d_out // 4), self.d_in)
            if packed.dtype != torch.uint8 or packed.shape != wanted:
                error_msgs.append(
                    f"{name} must be packed ternary weights, uint8 {wanted}, not {packed.dtype} {tuple(packed.shape)}"
                )
                state_dict[name] = self.codes
            else:
                try:
                    state_dict[name] = rows_from_hf(packed, self.d_out)
                except ValueError as error:
                    error_msgs.append(f"{name}: {error}")
                    state_dict[name] = self.codes
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _quantised(weight: Float[Tensor, "F D"], num_matrices: int) -> tuple[Tensor, Tensor]:
    codes, scale = ternary(weight.unflatten(0, (num_matrices, -1)))
    return pack_rows(codes.flatten(0, 1)), scale  # (F, D / 4), (M,)


class PackedLinear(nn.Module):
    """y = (codes of x) (codes of W)^T * (scale of the row * scale of W) (+ b), the sums in int32."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = TernaryWeight(linear.weight)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        y = quantised_mm(x.reshape(-1, x.shape[-1]), self.weight.codes, self.weight.scale)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PackedExperts(nn.Module):
    """The expert bank on codes: rows sorted by expert go in, rows in the same order come out."""

    def __init__(self, bank: Experts) -> None:
        super().__init__()
        self.activation = bank.activation
        self.first = TernaryWeight(bank.first, num_matrices(bank.activation) - 1)
        self.down = TernaryWeight(bank.down)
        gain = bank.sub_norm
        self.sub_norm = None if gain is None else nn.Parameter(gain.detach(), requires_grad=False)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "R D"]:
        def first(rows: Tensor) -> Tensor:
            return quantised_grouped_mm(rows, self.first.codes, self.first.scale, counts)

        def down(hidden: Tensor) -> Tensor:
            return quantised_grouped_mm(hidden, self.down.codes, self.down.scale, counts)

        return feed_experts(rows, counts, first, down, self.activation, self.sub_norm)
