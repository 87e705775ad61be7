"""The products of int8 rows and packed ternary weights, from codes and from floats."""

import importlib.util
import math

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemix.errors import ConfigError
from sparsemix.ops import build
from sparsemix.ops import ternary_mm as op
from sparsemix.ops.flop_counter import count_flops
from sparsemix.ops.ternary_mm import (
    SOURCE,
    int8_rows,
    quantised_grouped_mm,
    quantised_mm,
    reference,
    ternary_grouped_mm,
    ternary_mm,
    unpacked,
)
from sparsemix.ops.ternary_mm.pack import hf_from_rows, pack_hf, pack_rows, rows_from_hf, unpack_rows

needs_native = pytest.mark.skipif(build.unusable(SOURCE) is not None, reason=f"no C kernel: {build.unusable(SOURCE)}")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


NATIVE = pytest.param("native", marks=needs_native)


@pytest.fixture(
    params=["torch", NATIVE, pytest.param("portable", marks=needs_native), pytest.param("triton", marks=needs_triton)]
)
def impl(request, monkeypatch):
    """Every implementation; `portable` is the C kernel as built for any processor."""
    if request.param != "portable":
        return request.param
    monkeypatch.setenv("SPARSEMIX_ISA", "portable")
    return "native"


def codes_of(*shape, largest=1):
    return torch.randint(-largest, largest + 1, shape, dtype=torch.int8)


# D: one, below a byte, odd, with and without a last partial step, beyond what 16 bits sum; N: every height of tile.
SHAPES = [
    *((1, 1, 1), (1, 3, 2), (1, 10, 3), (1, 384, 33), (2, 63, 7), (3, 640, 5), (4, 128, 9), (5, 2049, 6)),
    *((17, 64, 16), (23, 63, 130), (64, 4096, 3), (2, 4097, 9), (7, 259, 1)),
]


@pytest.mark.parametrize(("N", "D", "F"), SHAPES)
def test_the_integer_product_is_its_reference(impl, N, D, F):
    rows, weight = codes_of(N, D, largest=127), codes_of(F, D)
    wanted = reference.ternary_mm(rows, weight)
    assert torch.equal(ternary_mm(rows, pack_rows(weight), impl), wanted)
    assert torch.equal(ternary_mm(rows, pack_rows(weight), "reference"), wanted)
    for most in (unpacked.EXACT_IN_FP32, 17):
        assert torch.equal(unpacked.float_product(rows, weight, most=most), wanted)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("code", [-1, 0, 1])
def test_the_largest_codes_overflow_nothing(impl, sign, code):
    D = 5000
    rows = torch.full((3, D), 127 * sign, dtype=torch.int8)
    weight = torch.full((5, D), code, dtype=torch.int8)
    assert (ternary_mm(rows, pack_rows(weight), impl) == 127 * D * sign * code).all()


@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_sums_beyond_fp32_stay_exact(impl):
    D = 2**24 // 127 + 4999
    rows, weight = torch.full((1, D), 127, dtype=torch.int8), torch.ones(1, D, dtype=torch.int8)
    rows[0, -1] = 3
    wanted = 127 * (D - 1) + 3
    assert wanted > 2**24 and float(torch.tensor(float(wanted))) != wanted, "the control: fp32 rounds it"
    assert int(ternary_mm(rows, pack_rows(weight), impl)) == wanted
    assert int(unpacked.float_product(rows, weight)) == wanted


def test_torch_unpacks_a_stretch_of_rows_at_a_time(monkeypatch):
    seen = []
    unpack = unpacked.unpack_rows
    monkeypatch.setattr(unpacked, "STRETCH", {"cpu": 3 * 63})
    monkeypatch.setattr(unpacked, "unpack_rows", lambda packed, D: seen.append(len(packed)) or unpack(packed, D))
    rows, weight = codes_of(5, 63, largest=127), codes_of(8, 63)
    assert torch.equal(ternary_mm(rows, pack_rows(weight), "torch"), reference.ternary_mm(rows, weight))
    assert seen == [3, 3, 2]


@pytest.mark.parametrize(("vnni", "exact"), [(True, False), (False, True)])
def test_without_a_fast_and_exact_int8_product_the_float_one_serves(monkeypatch, vnni, exact):
    rows, weight = codes_of(5, 9, largest=127), codes_of(3, 9)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(unpacked, "int_mm_is_exact_here", lambda: exact)
    monkeypatch.setattr(unpacked, "int_mm", refuse)
    assert torch.equal(ternary_mm(rows, pack_rows(weight), "torch"), reference.ternary_mm(rows, weight))


def test_where_torch_has_a_fast_int8_product_it_serves(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(unpacked, "int_mm_is_exact_here", lambda: True)
    monkeypatch.setattr(unpacked, "float_product", None)
    rows, weight = codes_of(5, 64, largest=127), codes_of(32, 64)
    assert torch.equal(ternary_mm(rows, pack_rows(weight), "torch"), reference.ternary_mm(rows, weight))


def test_the_probe_sees_a_product_that_saturates(monkeypatch):
    exact = torch._int_mm
    monkeypatch.setattr(unpacked, "int_mm", lambda a, b: exact(a, b).clamp(-32768, 32767))
    assert not unpacked.int_mm_is_exact_here.__wrapped__()


@pytest.mark.parametrize(("N", "D", "F"), [(0, 5, 3), (3, 5, 0), (3, 0, 5)])
def test_empty_products_are_zero(impl, N, D, F):
    out = ternary_mm(codes_of(N, D), pack_rows(codes_of(F, D)), impl)
    assert out.shape == (N, F) and out.dtype == torch.int32 and not out.any()
    values = quantised_mm(torch.randn(N, D), pack_rows(codes_of(F, D)), torch.ones(1), impl) if D else out
    assert values.shape == (N, F) and not values.any()


COUNTS = [[7, 0, 13, 1, 0], [0, 0, 63], [63, 0, 0], [9], [0, 0], [1, 1, 0, 0, 0, 0, 1, 2], [4, 5, 6]]


@pytest.mark.parametrize("counts", COUNTS)
def test_the_grouped_integer_product_is_its_reference(impl, counts):
    weight = codes_of(len(counts), 7, 23)
    for of_no_expert in (0, 3):
        rows = codes_of(sum(counts) + of_no_expert, 23, largest=127)
        out = ternary_grouped_mm(rows, pack_rows(weight), torch.tensor(counts), impl)
        assert torch.equal(out, reference.ternary_grouped_mm(rows, weight, torch.tensor(counts)))
        assert not out[sum(counts) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "D", "F"), [(1, 1, 1), (1, 10, 6), (3, 63, 10), (6, 640, 130), (2, 2049, 4)])
def test_the_product_of_values_is_its_steps_bit_for_bit(impl, dtype, N, D, F):
    x, weight, scale = (torch.randn(N, D) * 10 ** torch.randn(N, 1)).to(dtype), codes_of(F, D), torch.rand(1)
    rows, row_scale = int8_rows(x)
    wanted = (reference.ternary_mm(rows, weight).float() * (row_scale * scale)).to(dtype)
    out = quantised_mm(x, pack_rows(weight), scale, impl)
    assert out.dtype == dtype
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_grouped_product_of_values_has_a_scale_for_every_matrix(impl, dtype, matrices, counts):
    weight, scale = codes_of(len(counts), 10, 23), torch.rand(len(counts), matrices) + 0.5
    x = torch.randn(sum(counts) + 2, 23).to(dtype)
    x[sum(counts) :] = math.nan
    out = quantised_grouped_mm(x, pack_rows(weight), scale, torch.tensor(counts), impl)
    start = 0
    for e, count in enumerate(counts):
        rows, row_scale = int8_rows(x[start : start + count])
        sums = reference.ternary_mm(rows, weight[e]).float()
        for m in range(matrices):
            half = slice(m * 10 // matrices, (m + 1) * 10 // matrices)
            wanted = (sums[:, half] * (row_scale * scale[e, m])).to(dtype)
            assert torch.equal(out[start : start + count, half], wanted)
        start += count
    assert not out[start:].any(), "rows of no expert give 0, whatever they hold"


EXTREMES = [0.0, 1e-30, 1e-5, 3e38, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_rows_are_quantised_as_the_steps_do_it(impl, dtype, extreme):
    x, packed, scale = torch.randn(3, 33).to(dtype), pack_rows(codes_of(5, 33)), torch.ones(1)
    x[1] = 0 if extreme == 0 else x[1].clamp(-1, 1) * 1e-6
    x[1, 7] = extreme
    rows, row_scale = int8_rows(x)
    out = quantised_mm(x, packed, scale, impl)
    wanted = (ternary_mm(rows, packed, "reference").float() * row_scale).to(dtype)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    assert bool(out[1].isnan().all()) != math.isfinite(extreme) or (math.isfinite(extreme) and out.isfinite().all())


def test_halves_are_rounded_to_even(impl):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    out = quantised_mm(x, pack_rows(torch.eye(6, dtype=torch.int8)), torch.ones(1), impl)
    assert out.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_values_of_fp64_are_computed_in_fp64(impl):
    x, weight, scale = torch.randn(3, 23).double(), codes_of(7, 23), torch.rand(1)
    if impl != "torch":
        with pytest.raises(ConfigError, match=r"takes int8, float32, bfloat16, not torch\.float64"):
            quantised_mm(x, pack_rows(weight), scale, impl)
        impl = "auto"
    rows, row_scale = int8_rows(x)
    wanted = (rows.double() @ weight.double().T) * (row_scale * scale)
    out = quantised_mm(x, pack_rows(weight), scale, impl)
    torch.testing.assert_close(out, wanted, rtol=1e-14, atol=0)


def test_strided_operands_are_read_right(impl):
    x, weight, scale = torch.randn(63, 6).T, codes_of(5, 63), torch.ones(1)
    packed = pack_rows(weight).T.contiguous().T
    assert not x.is_contiguous() and not packed.is_contiguous()
    assert torch.equal(
        quantised_mm(x, packed, scale, impl), quantised_mm(x.contiguous(), pack_rows(weight), scale, "reference")
    )


@needs_native
def test_threads_change_nothing():
    rows, weight, counts = codes_of(23, 640, largest=127), codes_of(3, 101, 640), torch.tensor([9, 0, 13])
    packed, before = pack_rows(weight), torch.get_num_threads()
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs.append(ternary_grouped_mm(rows, packed, counts, "native"))
    torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert torch.equal(outs[0], reference.ternary_grouped_mm(rows, weight, counts))


class Poisoned(TorchDispatchMode):
    """Every new buffer is full of bytes that no result holds."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.fill_(0x55) if func is torch.ops.aten.new_empty.default else out


@needs_native
def test_the_kernel_writes_every_output_and_reads_nothing_unwritten():
    rows, weight, counts = codes_of(9, 70, largest=127), codes_of(3, 11, 70), torch.tensor([5, 0, 2])
    with Poisoned():
        out = op._sums(rows, pack_rows(weight), counts, "native")
    assert torch.equal(out, reference.ternary_grouped_mm(rows, weight, counts))


def test_a_matrix_of_another_width_is_refused():
    with pytest.raises(ValueError, match="3 bytes a row do not hold D=8 weights"):
        ternary_mm(codes_of(1, 8), pack_rows(codes_of(2, 9)))


def test_torch_accepts_the_products_as_ops_and_their_flops_are_counted():
    rows, packed, counts = codes_of(5, 9, largest=127), pack_rows(codes_of(3, 7, 9)), torch.tensor([2, 0, 2])
    x, scale = torch.randn(5, 9), torch.rand(3, 1)
    opcheck(torch.ops.sparsemix.ternary_mm.default, (rows, packed[0], None, "auto"))
    opcheck(torch.ops.sparsemix.ternary_mm.default, (rows, packed, counts, "auto"))
    opcheck(torch.ops.sparsemix.quantised_mm.default, (x, packed[0], scale[0], None, "auto"))
    opcheck(torch.ops.sparsemix.quantised_mm.default, (x, packed, scale, counts, "auto"))
    assert count_flops(lambda: ternary_mm(rows, packed[0])) == 2 * 5 * 9 * 7
    assert count_flops(lambda: ternary_grouped_mm(rows, packed, counts)) == 2 * 4 * 9 * 7
    for impl in ("auto", "torch"):
        assert count_flops(lambda: quantised_mm(x, packed[0], scale[0], impl)) == 2 * 5 * 9 * 7  # noqa: B023
        assert count_flops(lambda: quantised_grouped_mm(x, packed, scale, counts, impl)) == 2 * 4 * 9 * 7  # noqa: B023


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 1), (7, 5), (3, 9, 4), (2, 3, 6, 5), (0, 3)])
def test_unpacking_gives_back_what_was_packed(shape):
    codes = codes_of(*shape)
    packed = pack_rows(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] // 4))
    assert torch.equal(unpack_rows(packed, shape[-1]), codes)
    if 0 not in shape:
        assert torch.equal(hf_from_rows(packed, shape[-1]), pack_hf(codes))
        assert torch.equal(rows_from_hf(pack_hf(codes), shape[-2]), packed)


def test_the_bytes_of_the_kernels_layout_are_known():
    # P = 2: byte 0 holds the weights 0, 2, 4, 6, byte 1 the weights 1, 3, 5 and a zero.
    codes = torch.tensor([[-1, 0, 0, 1, 1, -1, 1]], dtype=torch.int8)
    assert pack_rows(codes).tolist() == [[0b10_10_01_00, 0b01_00_10_01]]
