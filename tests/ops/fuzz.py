"""Every op over number types, layouts, sizes and default types, against its reference: equal, or a clear error.

A program, as what it looks for ends a process: `python fuzz.py SEED MUTATIONS` prints how many cases it ran and how
many were refused. The case under way stands in the file that FUZZ_CASE
names; FUZZ_TYPES=2 leaves out the number types that have no C kernel."""

import itertools
import os
import random
import sys
from functools import partial
from pathlib import Path

import torch

from sparsemix.ops import product_key_topk as topk
from sparsemix.ops.cross_entropy import cross_entropy
from sparsemix.ops.cross_entropy.reference import cross_entropy as nats
from sparsemix.ops.expert_mlp import expert_mlp
from sparsemix.ops.expert_mlp.reference import expert_mlp as experts
from sparsemix.ops.grouped_mm import grouped_mm
from sparsemix.ops.grouped_mm.reference import grouped_mm as products
from sparsemix.ops.peer_experts import peer_experts
from sparsemix.ops.peer_experts.reference import peer_experts as neurons
from sparsemix.ops.row_adam import Moments, Rates, all_rows_, some_rows_
from sparsemix.ops.row_dot import row_dot
from sparsemix.ops.row_dot.reference import row_dot as dots
from sparsemix.ops.row_grad import Order, RowGrad, row_norm, sort_rows, table_grad
from sparsemix.ops.row_grad.reference import table_grad as gradient
from sparsemix.ops.row_mix import row_mix
from sparsemix.ops.row_mix.reference import row_mix as mixes
from sparsemix.ops.ternary_mm import quantised_grouped_mm, quantised_mm, ternary_grouped_mm, ternary_mm
from sparsemix.ops.ternary_mm.pack import pack_rows

REFUSALS = (RuntimeError, ValueError, IndexError)
TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# The error that rounding explains, of the size of the numbers; sizes are small and numbers are eighths.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01, torch.int32: 0}
SIZES = (0, 1, 5, 19)
RATES = Rates(0.1, (0.9, 0.99), 1e-8, 3)


def eighths(*shape):
    return torch.randint(-8, 9, shape, dtype=torch.int64).double() / 8


def ids(num_rows, *shape):
    return torch.randint(max(num_rows, 1), shape, dtype=torch.int64)


def counts_of(E, R):
    return torch.bincount(torch.randint(E + 1, (R,)), minlength=E + 1)[:E]


# Size -> operands, floating ones in fp64.
def mlp_operands(n, gated):
    E, D, F, N = 3, n, max(1, n // 2), n
    R = 2 * n
    return eighths(N, D), ids(N, R), eighths(R), counts_of(E, R), eighths(E, (1 + gated) * F, D), eighths(E, D, F)


def row_operands(n):
    M, R = max(n, 1), 3
    return eighths(n, n), ids(M, n, R), eighths(M, n)


def mixed_rows(n):
    M, R = max(n, 1), 3
    return eighths(n, R), ids(M, n, R), eighths(M, n)


def peer_operands(n):
    M, R = max(n, 1), 3
    return eighths(n, n), ids(M, n, R), eighths(n, R), eighths(M, n), eighths(M, n)


def labels(n):
    return eighths(n, n), eighths(max(n, 1), n), torch.where(torch.rand(n) < 0.3, -100, torch.randint(max(n, 1), (n,)))


def codes(*shape):
    return torch.randint(-1, 2, shape).to(torch.int8)


def packed_operands(n, grouped):
    weight = pack_rows(codes(3, 6, n) if grouped else codes(6, n))
    return torch.randint(-127, 128, (n, n)).to(torch.int8), weight, *((counts_of(3, n),) if grouped else ())


def quantised_operands(n, grouped):
    _, weight, *rest = packed_operands(n, grouped)
    return eighths(n, n), weight, eighths(*((3, 2) if grouped else (2,))).abs() + 0.5, *rest


def queries(n, by_head):
    side = max(n, 1)
    return eighths(n, 2, 2, n), eighths(*((2,) if by_head else ()), 2, side, n)


def sums_of_keys(query, keys, impl):
    left, right, _, _ = topk.product_key_topk(query, keys, min(4, keys.shape[-2] ** 2), impl)
    return left + right


def sums_of_pairs(left, right, impl):
    i, j = topk.best_pairs(left, right, min(3, left.shape[-1] ** 2), impl)
    return left.gather(-1, i) + right.gather(-1, j)


def norm_of(coef, looked_up, vec, impl):
    return row_norm(sort_rows(looked_up, 19, impl), coef, vec, impl)


def adam(step, table, first, second, coef, looked_up, vec, impl):
    """Without the op's own order the rows could not be mutated: it is made by the plainest implementation."""
    order = Order(*sort_rows(looked_up, len(table), "torch"))
    with torch.no_grad():
        step(table, Moments(first, second), RowGrad(looked_up, coef, vec), order, RATES, impl=impl)
    return torch.cat([table.double(), first.double(), second.double().reshape(len(table), -1)], 1)


def adam_operands(n, by_row):
    M, R = max(n, 1), 3
    second = eighths(M, *(() if by_row else (n,))).abs() + 0.125
    return eighths(M, n), eighths(M, n), second, eighths(n, R), ids(M, n, R), eighths(n, n)


def table_gradient(coef, looked_up, vec, impl):
    return table_grad(coef, looked_up, vec, 19, impl)


def of(op, *settings):
    return lambda *operands_and_impl: op(*operands_and_impl[:-1], *settings, operands_and_impl[-1])


def plain(reference, *settings):
    return lambda *operands_and_impl: reference(*operands_and_impl[:-1], *settings)


def as_reference(op):
    return lambda *operands_and_impl: op(*operands_and_impl[:-1], "reference")


# Name -> (operands of a size, op, reference); the last argument is the implementation.
OPS = {
    "expert_mlp": (partial(mlp_operands, gated=False), of(expert_mlp, "gelu"), plain(experts, "gelu")),
    "expert_mlp gated": (partial(mlp_operands, gated=True), of(expert_mlp, "silu"), plain(experts, "silu")),
    "grouped_mm": (lambda n: (eighths(2 * n, n), eighths(3, 7, n), counts_of(3, 2 * n)), grouped_mm, plain(products)),
    "row_dot": (row_operands, of(row_dot, False), plain(dots)),
    "row_mix": (mixed_rows, of(row_mix, False), plain(mixes)),
    "peer_experts": (peer_operands, of(peer_experts, "gelu", False), plain(neurons, "gelu")),
    "cross_entropy": (labels, lambda *x: cross_entropy(*x)[0], lambda *x: nats(*x[:-1])[0]),
    "product_key_topk": (partial(queries, by_head=False), sums_of_keys, as_reference(sums_of_keys)),
    "product_key_topk by head": (partial(queries, by_head=True), sums_of_keys, as_reference(sums_of_keys)),
    "best_pairs": (
        lambda n: (eighths(n, max(n, 1)), eighths(n, max(n, 1))),
        sums_of_pairs,
        as_reference(sums_of_pairs),
    ),
    "table_grad": (lambda n: (eighths(n, 3), ids(19, n, 3), eighths(n, n)), table_gradient, plain(gradient, 19)),
    "row_norm": (lambda n: (eighths(n, 3), ids(19, n, 3), eighths(n, n)), norm_of, as_reference(norm_of)),
    "row_adam some": (partial(adam_operands, by_row=False), partial(adam, some_rows_), None),
    "row_adam all": (partial(adam_operands, by_row=False), partial(adam, all_rows_), None),
    "row_adam some by row": (partial(adam_operands, by_row=True), partial(adam, some_rows_), None),
    "row_adam all by row": (partial(adam_operands, by_row=True), partial(adam, all_rows_), None),
    "ternary_mm": (partial(packed_operands, grouped=False), ternary_mm, as_reference(ternary_mm)),
    "ternary_grouped_mm": (
        partial(packed_operands, grouped=True),
        ternary_grouped_mm,
        as_reference(ternary_grouped_mm),
    ),
    "quantised_mm": (partial(quantised_operands, grouped=False), quantised_mm, as_reference(quantised_mm)),
    "quantised_grouped_mm": (
        partial(quantised_operands, grouped=True),
        quantised_grouped_mm,
        as_reference(quantised_grouped_mm),
    ),
}


def strided(x):
    return torch.stack([x, x], dim=-1)[..., 0]


def offset(x):
    return torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)


def expanded(x):
    return x[:1].expand_as(x) if x.ndim and x.numel() else x


def of_stride_zero(x):
    return x.flatten()[0].expand(x.shape) if x.numel() else x


def negated(x):
    """Numbers whose sign torch has yet to turn."""
    return torch._neg_view(-x) if x.is_floating_point() else x


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "strided": strided,
    "offset": offset,
    "expanded": expanded,
    "of stride zero": of_stride_zero,
    "negated": negated,
}


def laid_out(operands, layout, dtype, written):
    """Floating operands in `dtype`; counts add up to what they did, and what is written in place has its own memory."""
    found = []
    for i, x in enumerate(operands):
        x = x.to(dtype) if x.is_floating_point() else x
        shared = layout in ("expanded", "of stride zero")
        keeps = shared and (i in written or (x.ndim == 1 and not x.is_floating_point()))
        found.append(x if keeps else LAYOUTS[layout](x))
    return found


def run(op, operands, impl, differentiable):
    """Outputs and gradients of floating operands in fp64, or the refusal."""
    moving = []
    if differentiable:
        operands = [x.detach().requires_grad_() if x.is_floating_point() else x for x in operands]
        moving = [x for x in operands if x.is_floating_point()]
    y = op(*operands, impl)
    grads = torch.autograd.grad(y.double().sum(), moving, allow_unused=True) if moving and y.requires_grad else ()
    return [y.detach().double(), *(g.detach().double() for g in grads if g is not None)]


def check(name, operands, impl, note, floating=None):
    """None if the op answered, else what it said; AssertionError if it answered wrongly."""
    _, op, reference = OPS[name]
    written = {0, 1, 2} if "adam" in name else set()
    differentiable = not written and not any(
        word in name for word in ("ternary", "quantised", "norm", "pairs", "table")
    )
    note(f"{name} impl={impl} default={torch.get_default_dtype()} " + " ".join(describe(x) for x in operands))
    # Integers where floating numbers belong are cast by ops that take another operand's type.
    floating = floating or [x.is_floating_point() for x in operands]
    whole = (lambda x: x) if "mm" in name and name != "grouped_mm" else torch.Tensor.long
    exact = [x.double() if f else whole(x) for x, f in zip(operands, floating, strict=True)]
    exact = [x.contiguous().clone() for x in exact]
    # They have no gradient then.
    differentiable = differentiable and all(x.is_floating_point() == f for x, f in zip(operands, floating, strict=True))
    types = [x.dtype for x in operands if x.is_floating_point()]
    try:
        found = run(op, [x.clone() if i in written else x for i, x in enumerate(operands)], impl, differentiable)
    except REFUSALS as error:
        message = str(error)
        assert message and "please report" not in message, message
        return message
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        wanted = run(reference or as_reference(op), exact, "reference", differentiable)
    finally:
        torch.set_default_dtype(default)
    # Where a number lies half way between two codes either is right.
    tolerance = max((TOLERANCE[dtype] for dtype in types), default=0) if "quantised" not in name else 0.05
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        assert torch.equal(got.isnan(), want.isnan())
        got, want = got.nan_to_num(), want.nan_to_num()
        error = float((got - want).norm())
        assert error <= tolerance * (float(want.norm()) + want.numel() ** 0.5), f"error {error} of {float(want.norm())}"
    return None


def describe(x):
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}/{list(x.stride())}"


def mutated(operands, dice):
    """One operand of another type, size, layout or with numbers of nothing."""
    operands, i = list(operands), dice.randrange(len(operands))
    x = operands[i]
    kind = dice.choice(["type", "type", "longer", "shorter", "flat", "numbers", "layout"])
    if kind == "type":
        x = x.to(dice.choice([*TYPES, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64]))
    elif kind == "longer" and x.ndim:
        axis = dice.randrange(x.ndim)
        x = torch.cat([x, x, x.narrow(axis, 0, min(1, x.shape[axis]))], dim=axis)
    elif kind == "shorter" and x.ndim:
        axis = dice.randrange(x.ndim)
        x = x.narrow(axis, 0, x.shape[axis] // 2)
    elif kind == "flat":
        x = x.flatten()
    elif kind == "numbers" and not x.is_floating_point() and x.numel():
        x = x.clone()
        x[tuple(dice.randrange(size) for size in x.shape)] = dice.choice([-1, 100, -100, 127])
    elif kind == "layout":
        x = LAYOUTS[dice.choice([*LAYOUTS])](x)
    operands[i] = x
    return operands


def main(seed, mutations):
    case = Path(os.environ["FUZZ_CASE"]).open("w", encoding="utf-8")  # noqa: SIM115  (open to the end)

    def note(text):
        case.seek(0)
        case.truncate()
        case.write(text)
        case.flush()

    torch.manual_seed(seed)
    dice, ran, refused = random.Random(seed), 0, 0
    # The first two are those of the C kernels.
    types = TYPES[: int(os.environ.get("FUZZ_TYPES", len(TYPES)))]
    impls = ("auto",) if len(types) == 2 else ("auto", "torch")
    # Every op, type and layout; sizes and default types in turn, so that each meets each of the others.
    for turn, (name, dtype, layout) in enumerate(itertools.product(OPS, types, LAYOUTS)):
        torch.set_default_dtype(torch.float32)
        n = SIZES[(turn + turn // len(LAYOUTS)) % len(SIZES)]
        operands = laid_out(OPS[name][0](n), layout, dtype, {0, 1, 2} if "adam" in name else set())
        torch.set_default_dtype(dice.choice(TYPES))
        said = check(name, operands, dice.choice(impls), note)
        # What PyTorch lacks in half precision is its own error.
        assert said is None or dtype == torch.float16, said
        ran, refused = ran + 1, refused + (said is not None)
    for _ in range(mutations):
        torch.set_default_dtype(torch.float32)
        name, dtype = dice.choice([*OPS]), dice.choice(TYPES[:3])
        operands = laid_out(OPS[name][0](dice.choice(SIZES)), dice.choice([*LAYOUTS][:4]), dtype, {0, 1, 2})
        torch.set_default_dtype(dice.choice(TYPES))
        floating = [x.is_floating_point() for x in operands]
        wrong, impl = mutated(operands, dice), dice.choice(["auto", "auto", "torch"])
        refused += check(name, wrong, impl, note, floating) is not None
        ran += 1
    print(f"{ran} cases, {refused} refused")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(int(sys.argv[1]), int(sys.argv[2]))
