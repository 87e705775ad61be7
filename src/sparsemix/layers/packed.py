"""BitNet b1.58 at inference: int8 codes in memory, two bits a weight in the state dict, integer products."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemix.config import ConfigError
from sparsemix.layers.linear import Experts, Linear, feed_experts, num_matrices
from sparsemix.layers.ternary import Warmup, rescaled, spread
from sparsemix.ops.ternary_mm import int8_rows, ternary, ternary_grouped_mm, ternary_mm
from sparsemix.ops.ternary_mm.pack import pack_hf, unpack_hf


def pack_ternary(module: nn.Module) -> nn.Module:
    """`module` with every ternary Linear and expert bank inside it replaced, in place, by codes and scales; for
    inference only, as nothing trainable is left of them.

    The result equals the forward that was trained: its sums of codes bit for bit. To load a packed state dict, pack a
    freshly built model and load into that. Raises ConfigError if nothing is ternary or a warm-up is not over."""
    for name, layer in module.named_modules():
        if isinstance(layer, Warmup) and int(layer.step) < layer.steps:
            raise ConfigError(
                f"{name}.step={int(layer.step)} is less than warmup_steps={layer.steps}: the layer is still partly "
                "float; train on, or build it without a warm-up"
            )
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


def _packed(module: nn.Module) -> nn.Module:
    if isinstance(module, Linear) and module.precision.ternary:
        return PackedLinear(module)
    if isinstance(module, Experts) and module.precision.ternary:
        return PackedExperts(module)
    return module


class TernaryWeight(nn.Module):
    """W = codes * scale. In memory `codes` (..., F, D) int8; in the state dict `codes` (..., F / 4, D) uint8, four
    rows of weights in a byte (ops/ternary_mm/pack.py). `scale` fp32, one a matrix, multiplies."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Float[Tensor, "*E F D"], num_matrices: int = 1) -> None:
        """`num_matrices` lie one after the other in F, each with its own scale: codes stay (..., F, D), scale gets a
        last axis of that length."""
        super().__init__()
        codes, scale = ternary(weight.detach().unflatten(-2, (num_matrices, -1)))  # scale (..., M)
        self.register_buffer("codes", codes.flatten(-3, -2))
        self.register_buffer("scale", scale)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = pack_hf(self.codes)

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
            wanted = (*self.codes.shape[:-2], -(-self.codes.shape[-2] // 4), self.codes.shape[-1])
            if packed.dtype != torch.uint8 or packed.shape != wanted:
                error_msgs.append(
                    f"{name} must be packed ternary weights, uint8 {wanted}, not {packed.dtype} {tuple(packed.shape)}"
                )
                state_dict[name] = self.codes
            else:
                try:
                    state_dict[name] = unpack_hf(packed, self.codes.shape[-2])
                except ValueError as error:
                    error_msgs.append(f"{name}: {error}")
                    state_dict[name] = self.codes
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class PackedLinear(nn.Module):
    """y = (codes of x) (codes of W)^T * (scale of the row * scale of W) (+ b), the sums in int32."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = TernaryWeight(linear.weight)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        rows, row_scale = int8_rows(x.flatten(0, -2) if x.ndim > 1 else x[None])
        sums = ternary_mm(rows, self.weight.codes)
        y = rescaled(sums, row_scale * self.weight.scale, x.dtype).view(*x.shape[:-1], -1)
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
        def multiply(weight: TernaryWeight, rows: Tensor) -> Tensor:
            codes, row_scale = int8_rows(rows)
            sums = ternary_grouped_mm(codes, weight.codes, counts)
            scale = spread(weight.scale, counts, len(rows), weight.codes.shape[1])
            return rescaled(sums, row_scale * scale, rows.dtype)

        def first(rows: Tensor) -> Tensor:
            return multiply(self.first, rows)

        def down(hidden: Tensor) -> Tensor:
            return multiply(self.down, hidden)

        return feed_experts(rows, counts, first, down, self.activation, self.sub_norm)
