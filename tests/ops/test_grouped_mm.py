from functools import partial

import pytest
import torch
from compare import assert_rounded, assert_same, poisoned, randn, sizes, usable
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from sparsemix.ops import build
from sparsemix.ops.flop_counter import count_flops
from sparsemix.ops.grouped_mm import grouped_mm
from sparsemix.ops.grouped_mm.reference import grouped_mm as reference


@pytest.mark.parametrize("expanded", [False, True], ids=["gradient", "stride_0_gradient"])
@pytest.mark.parametrize(
    ("counts", "D", "F"),
    [
        ([7, 0, 13, 1, 0], 10, 3),
        ([0, 0, 63], 5, 7),
        ([63, 0, 0], 7, 5),
        ([9], 3, 11),
        ([1, 1, 1], 1, 1),
        ([5, 0, 6], 640, 17),
        ([0, 0], 4, 3),
    ],
    ids=["empty_experts", "all_on_the_last", "all_on_the_first", "one_expert", "width_one", "D_640", "no_rows"],
)
def test_grouped_product_is_its_reference_with_all_gradients(counts, D, F, expanded):
    counts = torch.tensor(counts)
    assert_same(grouped_mm, reference, randn(int(counts.sum()), D), randn(len(counts), F, D), counts, expanded=expanded)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0]])
def test_rows_of_no_expert_give_zero_cost_nothing_and_take_no_gradient(counts):
    counts, rows, weight = torch.tensor(counts), randn(9, 4), randn(3, 6, 4)
    assert_same(grouped_mm, reference, rows, weight, counts)
    rows = rows.requires_grad_()
    out = grouped_mm(rows, weight, counts)
    assert out[counts.sum() :].abs().max() == 0
    assert torch.autograd.grad(out.square().sum(), rows)[0][counts.sum() :].abs().max() == 0
    assert count_flops(lambda: grouped_mm(rows, weight, counts)) == 2 * int(counts.sum()) * 4 * 6


@pytest.mark.parametrize("without_values", [FakeTensorMode(), torch.device("meta")], ids=["fake", "meta"])
def test_where_counts_have_no_values_every_row_counts(without_values):
    with without_values:
        rows, weight, counts = torch.empty(9, 4), torch.empty(3, 6, 4), torch.empty(3, dtype=torch.long)
        assert count_flops(lambda: torch.ops.sparsemix.grouped_mm(rows, weight, counts)) == 2 * 9 * 4 * 6


def test_grouped_product_takes_strided_rows_and_weights():
    rows, weight = randn(5, 12).T, randn(3, 5, 7).mT
    assert not rows.is_contiguous()
    assert not weight.is_contiguous()
    assert_same(grouped_mm, reference, rows, weight, torch.tensor([5, 0, 7]))


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["dense", "rows_apart", "rows_shifted", "weight_turned", "rows_turned"])
@pytest.mark.parametrize(("D", "F"), [(16, 24), (12, 8), (7, 16), (16, 5), (640, 32)])
@pytest.mark.parametrize("counts", [[7, 0, 13, 1, 0], [0, 0, 21], [21, 0, 0], [2, 0, 3], [1, 0, 0]], ids=str)
def test_low_precision_errs_no_more_than_plain_products_whichever_kernel_runs(counts, D, F, layout, dtype, impl):
    counts, R = torch.tensor(counts), 21
    rows, weight = randn(R, D), randn(len(counts), F, D)
    exact = reference(rows, weight, counts)
    low, low_weight = rows.to(dtype), weight.to(dtype)
    if layout == "rows_apart":
        low = torch.cat([low, low], dim=1)[:, :D]
    elif layout == "rows_shifted":
        low = torch.cat([low.new_zeros(1), low.flatten()])[1:].view(R, D)
    elif layout == "rows_turned":
        low = low.T.contiguous().T
    elif layout == "weight_turned":
        low_weight = low_weight.mT.contiguous().mT
    low.requires_grad_()
    low_weight.requires_grad_()
    out = grouped_mm(low, low_weight, counts, impl)
    direction = randn(R, F)
    grads = torch.autograd.grad(out, (low, low_weight), direction.to(dtype))
    rows.requires_grad_()
    weight.requires_grad_()
    wanted = torch.autograd.grad(reference(rows, weight, counts), (rows, weight), direction)
    plain = reference(low, low_weight, counts)
    plain_grads = torch.autograd.grad(plain, (low, low_weight), direction.to(dtype))
    size = sizes(partial(reference, counts=counts), (rows, weight), direction)
    others = (plain, *plain_grads)
    for got, want, other, s in zip((out, *grads), (exact, *wanted), others, size, strict=True):
        assert_rounded(got, want, s, dtype, max(R, D, F), other)
    assert out[counts.sum() :].abs().sum() == 0


@pytest.mark.parametrize("isa", build.ISAS)
@pytest.mark.parametrize(
    ("counts", "D", "F"),
    [
        ([33, 1, 0, 15], 67, 35),
        ([601, 0], 33, 15),
        ([1, 1101], 19, 37),
        ([5, 0, 31], 290, 301),
        ([1, 0, 1, 1, 1, 1], 35, 65),
    ],
    ids=["odd_everything", "all_on_the_first", "many_and_one", "wide", "one_row_each"],
)
def test_low_precision_of_every_instruction_set_errs_no_more_than_plain_products(counts, D, F, isa, monkeypatch):
    usable(isa, monkeypatch)
    rows, weight, grad = randn(sum(counts) + 2, D), randn(len(counts), F, D), randn(sum(counts) + 2, F)
    counts, found = torch.tensor(counts), []
    kinds = ((grouped_mm, torch.bfloat16, ("native",)), (reference, torch.bfloat16, ()), (reference, torch.double, ()))
    for op, dtype, settings in kinds:
        # The same numbers in all: how operands are rounded is not in question.
        moving = [x.bfloat16().to(dtype).requires_grad_() for x in (rows, weight)]
        with poisoned():
            y = op(*moving, counts, *settings)
            found.append([y, *torch.autograd.grad(y, moving, grad.bfloat16().to(dtype))])
    size = sizes(partial(reference, counts=counts), (rows, weight), grad)
    for got, other, want, s in zip(*found, size, strict=True):
        assert_rounded(got, want, s, torch.bfloat16, 1, other)


@pytest.mark.parametrize("isa", build.ISAS)
def test_what_is_no_number_stays_in_its_row(isa, monkeypatch):
    # 5 and 3 are odd: neighbours in memory must not be taken for the other half of a pair.
    usable(isa, monkeypatch)
    rows, weight = randn(7, 5).bfloat16(), randn(2, 3, 5).bfloat16()
    rows[3] = torch.nan
    others, counts = [0, 1, 2, 4, 5, 6], torch.tensor([3, 4])
    out = grouped_mm(rows, weight, counts, "native")
    assert out[3].isnan().all()
    assert out[others].isfinite().all()
    back = grouped_mm(out, weight.mT, counts, "native")
    assert back[others].isfinite().all()
    grads = torch.ops.sparsemix.grouped_mm_weight_grad(out, rows, counts, "native")
    assert grads[0].isfinite().all()
    assert grads[1].isnan().all()


def test_grouped_product_is_the_per_row_product():
    counts, rows, weight = torch.tensor([2, 0, 3]), randn(5, 4), randn(3, 6, 4)
    experts = [0, 0, 2, 2, 2]
    wanted = torch.stack([weight[e] @ row for e, row in zip(experts, rows, strict=True)])
    torch.testing.assert_close(grouped_mm(rows, weight, counts), wanted, rtol=0, atol=1e-11)


def test_an_expert_without_rows_gets_a_zero_gradient():
    weight = randn(3, 6, 4).requires_grad_()
    grouped_mm(randn(5, 4), weight, torch.tensor([2, 0, 3])).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad[1].abs().max() == 0
    assert weight.grad[0].abs().min() > 0


def test_grouped_product_under_autocast_is_bf16_with_gradients_in_the_dtype_of_the_inputs():
    rows, weight, counts = randn(9, 16).float(), randn(2, 5, 16).float(), torch.tensor([4, 5])
    rows.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_mm(rows, weight, counts)
        wanted = torch.cat([rows[:4] @ weight[0].T, rows[4:] @ weight[1].T])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted)
    grads = torch.autograd.grad(out.float().sum(), (rows, weight))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]


def test_only_the_asked_gradients_are_computed():
    rows, weight, counts = randn(4, 3), randn(2, 5, 3).requires_grad_(), torch.tensor([1, 3])
    (d_weight,) = torch.autograd.grad(grouped_mm(rows, weight, counts).sum(), weight)
    (wanted,) = torch.autograd.grad(reference(rows, weight, counts).sum(), weight)
    torch.testing.assert_close(d_weight, wanted, rtol=0, atol=1e-11)


def test_torch_accepts_the_grouped_product_as_an_op():
    counts = torch.tensor([2, 0, 3])
    rows, weight = randn(5, 4).requires_grad_(), randn(3, 6, 4).requires_grad_()
    opcheck(torch.ops.sparsemix.grouped_mm.default, (rows, weight, counts))
    opcheck(torch.ops.sparsemix.grouped_mm_weight_grad.default, (randn(5, 6), randn(5, 4), counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "D", "F"),
    [([7, 0, 13, 1, 0], 10, 3), ([0, 0, 70], 5, 67), ([3], 1, 1), ([2, 130], 33, 16), ([0, 0], 4, 3)],
    ids=str,
)
def test_triton_kernels_are_the_reference_with_all_gradients(counts, D, F, dtype):
    R, counts = sum(counts) + 3, torch.tensor(counts)
    operands = [randn(R, D).to(dtype), randn(len(counts), D, F).to(dtype).mT]
    direction = randn(R, F).to(dtype)
    found = []
    for op, kind in ((lambda *x: grouped_mm(*x, impl="triton"), dtype), (reference, torch.double)):
        moving = [x.to(kind).detach().requires_grad_() for x in operands]
        y = op(*moving, counts)
        found.append((y, *torch.autograd.grad(y, moving, direction.to(kind))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want.to(dtype))


@pytest.mark.parametrize("counts", [[9000, 0, 3, 700], [0, 0], [0, 0, 5], [1, 2, 3], [40] * 70], ids=len)
def test_triton_tiles_hold_every_row_of_every_expert_once(counts):
    from sparsemix.ops.grouped_mm.triton import lay

    R = sum(counts) + 9
    tiles = lay(torch.tensor(counts), R, torch.bfloat16)
    held = [[] for _ in counts]
    for e, row, end in tiles.table.T.tolist():
        if row < end:
            held[e] += range(row, min(row + tiles.rows, end))
    ends = torch.tensor(counts).cumsum(0).tolist()
    assert held == [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]


@pytest.mark.parametrize("counts", [[300, 0, 5], [0, 0, 0], [16] * 40], ids=["few", "none", "many"])
def test_every_entry_is_written_by_any_number_of_threads_and_instruction_set(counts, monkeypatch):
    counts, rows, weight = torch.tensor(counts), randn(sum(counts) + 7, 33).float(), randn(len(counts), 65, 33).float()

    def results():
        out = grouped_mm(rows, weight, counts, "native")
        turned = grouped_mm(out, weight.mT, counts, "native")
        return out, turned, torch.ops.sparsemix.grouped_mm_weight_grad(out, rows, counts, "native")

    one = results()
    assert all(x.isfinite().all() for x in one)
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(), one, strict=True))
    finally:
        torch.set_num_threads(1)
    monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    for got, want in zip(results(), one, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


BAD_COUNTS = {
    "more_than_there_are": ([4, 5, 1], "of 1 to 5 rows an expert must be at least 0 and add up to at most 9 rows"),
    "negative": ([4, -1, 2], "of -1 to 4 rows"),
    "wrapping": ([2**62, 2**62, 2**62], "of 4611686018427387904 to 4611686018427387904 rows"),
    "too_few": ([4, 5], r"counts of shape \(2,\) must be \(E\) with R=9, D=4, E=3"),
}


@pytest.mark.parametrize("impl", ["reference", "torch", "native"])
@pytest.mark.parametrize(("counts", "says"), BAD_COUNTS.values(), ids=BAD_COUNTS)
def test_counts_that_reach_past_the_rows_are_an_error(counts, says, impl):
    with pytest.raises((ValueError, RuntimeError), match=says):
        torch.ops.sparsemix.grouped_mm(torch.randn(9, 4), torch.randn(3, 6, 4), torch.tensor(counts), impl)


def cut_to_tf32(rows, weight, counts):
    """Ten bits of the fraction are left, as in a GPU's tf32."""
    rows, weight = ((x.float().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (rows, weight))
    return reference(rows, weight, counts)


def summed_in_its_own_type(rows, weight, counts):
    """Every partial sum is rounded to the type, as a kernel that does not widen bf16 would."""
    out = torch.zeros(len(rows), weight.shape[1], dtype=rows.dtype)
    for d in range(rows.shape[1]):
        out += rows[:, d : d + 1] * weight[0, :, d]
    return out


def less_one_term(rows, weight, counts):
    return reference(rows[:, 1:], weight[..., 1:], counts)


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        (cut_to_tf32, torch.float32),
        (less_one_term, torch.float32),
        (less_one_term, torch.bfloat16),
        (summed_in_its_own_type, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("D", "F"), [(64, 24), (640, 32)])
def test_the_bound_of_rounding_lets_no_faulty_product_pass(D, F, fault, dtype):
    rows, weight, counts = randn(21, D).to(dtype), randn(1, F, D).to(dtype), torch.tensor([21])
    exact = reference(rows.double(), weight.double(), counts)
    size = reference(rows.double().square(), weight.double().square(), counts).sqrt()
    plain = reference(rows, weight, counts)
    assert_rounded(plain, exact, size, dtype, D)
    with pytest.raises(AssertionError, match="by rounding"):
        assert_rounded(fault(rows, weight, counts), exact, size, dtype, D, plain)
