"""Feed-forward experts on picked tokens, from tokens to tokens: gather, both products and the sum over picks."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsemix.ops.expert_mlp import plain, reference
from sparsemix.ops.grouped_mm import rows_run
from sparsemix.ops.impl import Kernels
from sparsemix.ops.operands import check_op
from sparsemix.ops.precision import autocast
from sparsemix.ops.transforms import check_sizes, transformed

KERNELS = Kernels("expert_mlp", source=Path(__file__).with_name("native.c"), triton=True)
ACTS = ("relu", "silu", "gelu", "gelu_tanh")  # the number is the kernel's


def expert_mlp(
    tokens: Float[Tensor, "N D"],
    token_ids: Int[Tensor, " R"],
    gates: Float[Tensor, " R"],
    counts: Int[Tensor, " E"],
    first: Float[Tensor, "E M D"],
    down: Float[Tensor, "E D F"],
    act: str,
    impl: str = "auto",
) -> Float[Tensor, "N D"]:
    """y_n = sum over the picks r with token_ids_r = n of gates_r down_e(r) hidden_r, hidden_r = act(first_e(r) x_n),
    or act(gate) * up with (gate, up) = first_e(r) x_n where first has 2 F rows.

    Picks are sorted by expert and counts says how many each has; picks after the last expert's add nothing. The sum
    over picks has a fixed order. Backward keeps the rows of first_e x alone: with a_r = hidden_r,
    dL/dgates_r = <down_e^T dy_n, a_r> (arXiv:2512.14080). Under autocast tokens and weights take its dtype."""
    tokens, first, down = autocast(tokens, first, down)
    if transformed():
        check_sizes(counts)
        return reference.expert_mlp(tokens, token_ids, gates, counts, first, down, act)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (tokens, gates, first, down))
    return torch.ops.sparsemix.expert_mlp(tokens, token_ids, gates, counts, first, down, act, keep, impl)[0]


@torch.library.custom_op("sparsemix::expert_mlp", mutates_args=())
def _forward(
    tokens: Tensor,
    token_ids: Tensor,
    gates: Tensor,
    counts: Tensor,
    first: Tensor,
    down: Tensor,
    act: str,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """y, and if `keep` the rows of first_e x, (R, M)."""
    check_op("expert_mlp", tokens, token_ids, gates, counts, first, down)
    _check_act(act, first, down)
    token_ids, counts = token_ids.long().contiguous(), counts.long().contiguous()
    picked = KERNELS.pick(impl, tokens, gates, first, down)
    if picked == "triton":
        from sparsemix.ops.expert_mlp import triton

        return triton.forward(tokens, token_ids, gates, counts, first, down, act, keep)
    if picked != "native":
        return plain.forward(tokens, token_ids, gates, counts, first, down, act, keep, picked)
    N, R = len(tokens), len(token_ids)
    tokens, first, down = (x.contiguous() for x in (tokens, first, down))
    y, pre = torch.empty_like(tokens), tokens.new_empty(R if keep else 0, first.shape[1])
    # Picks of no expert have no row of their own and are never read.
    pre[int(counts.sum()) :] = 0
    operands = tokens, token_ids, gates.float().contiguous(), counts, first, down
    KERNELS.call("forward", y, pre if keep else None, *operands, N, *_settings(first, down, act))
    return y, pre


@torch.library.custom_op("sparsemix::expert_mlp_backward", mutates_args=())
def _grads(
    dy: Tensor,
    pre: Tensor,
    tokens: Tensor,
    token_ids: Tensor,
    gates: Tensor,
    counts: Tensor,
    first: Tensor,
    down: Tensor,
    act: str,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of tokens, gates, first and down; empty ones where `needs` says no."""
    check_op("expert_mlp_backward", dy, pre, tokens, token_ids, gates, counts, first, down)
    _check_act(act, first, down)
    token_ids, counts = token_ids.long().contiguous(), counts.long().contiguous()
    picked = KERNELS.pick(impl, tokens, gates, first, down)
    if picked == "triton":
        from sparsemix.ops.expert_mlp import triton

        return triton.backward(dy, pre, tokens, token_ids, gates, counts, first, down, act, needs)
    if picked != "native":
        return plain.backward(dy, pre, tokens, token_ids, gates, counts, first, down, act, needs, picked)
    N, R = len(tokens), len(token_ids)
    dy, pre, tokens, first, down = (x.contiguous() for x in (dy, pre, tokens, first, down))
    d_gates = torch.zeros(R, dtype=torch.float32)
    found = [torch.empty_like(x) if need else None for x, need in zip((tokens, first, down), needs, strict=True)]
    operands = dy, pre, tokens, token_ids, gates.float().contiguous(), counts, first, down
    KERNELS.call("backward", found[0], d_gates, *found[1:], *operands, N, *_settings(first, down, act))
    d_tokens, d_first, d_down = (tokens.new_empty(0) if x is None else x for x in found)
    return d_tokens, d_gates.to(gates.dtype), d_first, d_down


def _check_act(act: str, first: Tensor, down: Tensor) -> None:
    M, F = first.shape[1], down.shape[2]
    if act not in ACTS:
        raise ValueError(f"expert_mlp: act={act} is none of {', '.join(ACTS)}")
    if M not in (F, 2 * F):
        raise RuntimeError(f"expert_mlp: first of M={M} rows an expert must have F={F} or, gated, 2 F={2 * F}")


def _settings(first: Tensor, down: Tensor, act: str) -> tuple[int, ...]:
    """E, D, F, the activation, is there a gate, and is it bf16?"""
    E, D, F = down.shape
    return E, D, F, ACTS.index(act), int(first.shape[1] == 2 * F), int(first.dtype == torch.bfloat16)


@_forward.register_fake
def _(tokens, token_ids, gates, counts, first, down, act, keep, impl):
    return torch.empty_like(tokens), tokens.new_empty(token_ids.shape[0] if keep else 0, first.shape[1])


@_grads.register_fake
def _(dy, pre, tokens, token_ids, gates, counts, first, down, act, needs, impl):
    shaped = (
        torch.empty_like(x) if need else x.new_empty(0) for x, need in zip((tokens, first, down), needs, strict=True)
    )
    d_tokens, d_first, d_down = shaped
    return d_tokens, torch.empty_like(gates), d_first, d_down


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.act, _, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy: Tensor, _):
    *inputs, pre = ctx.saved_tensors
    tokens, _, gates, _, first, down = (ctx.needs_input_grad[i] for i in range(6))
    needs = [tokens, first, down]
    d_tokens, d_gates, d_first, d_down = _grads(dy, pre, *inputs, ctx.act, needs, ctx.impl)
    found = (d_tokens, None, d_gates, None, d_first, d_down)
    asked = (tokens, False, gates, False, first, down)
    return *(x if need else None for x, need in zip(found, asked, strict=True)), None, None, None


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.sparsemix.expert_mlp, get_raw=True)
def _flops(tokens, token_ids, gates, counts, first, down, *args, **kwargs) -> int:
    """2 FLOPs a weight of its expert for every pick that some expert runs."""
    return 2 * rows_run(token_ids, counts) * (first[0].numel() + down[0].numel())


@register_flop_formula(torch.ops.sparsemix.expert_mlp_backward, get_raw=True)
def _backward_flops(dy, pre, tokens, token_ids, gates, counts, first, down, act, needs, *args, **kwargs) -> int:
    """Nothing is computed again: twice the forward, less the weight gradients that nobody asked for."""
    into, out = first[0].numel(), down[0].numel()
    return 2 * rows_run(token_ids, counts) * (into + out + needs[1] * into + needs[2] * out)
