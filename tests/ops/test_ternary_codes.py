"""Codes and scales of weights and rows, and the layouts of files."""

import math

import pytest
import torch

from sparsemix.ops.ternary_mm import int8_row_values, int8_rows, reference, ternary, ternary_values
from sparsemix.ops.ternary_mm.pack import pack_hf, pack_i2_s, unpack_hf, unpack_i2_s


def codes_of(*shape, largest=1):
    return torch.randint(-largest, largest + 1, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 23), (64, 63)])
def test_ternary_weights_are_their_reference(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    codes, scale = ternary(weight)
    wanted, wanted_scale = reference.ternary(weight)
    assert torch.equal(codes, wanted)
    assert float(scale) == pytest.approx(wanted_scale, rel=1e-14)
    assert set(codes.unique().tolist()) <= {-1, 0, 1}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 640)])
def test_int8_rows_are_their_reference(shape):
    x = torch.randn(shape, dtype=torch.float64) * 10 ** torch.randn(shape[0], 1, dtype=torch.float64)
    codes, scale = int8_rows(x)
    wanted, wanted_scale = reference.int8_rows(x)
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(scale[:, 0].tolist(), wanted_scale, rtol=1e-14, atol=0)


def test_halves_round_to_even():
    # Mean 1: the codes of 0.5 and 1.5 are round(0.5) = 0 and clamp(2) = 1.
    assert ternary(torch.tensor([[0.5, 1.5, -0.5, -1.5]]))[0].tolist() == [[0, 1, 0, -1]]
    assert int8_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5]]))[0].tolist() == [[127, 0, 2, 2, 0]]


def test_stacking_matrices_does_not_change_their_codes_or_scales():
    stack = torch.randn(5, 7, 9) * torch.tensor([1e-3, 1.0, 1.0, 50.0, 3.0])[:, None, None]
    codes, scale = ternary(stack)
    for e, matrix in enumerate(stack):
        alone, alone_scale = ternary(matrix)
        assert torch.equal(codes[e], alone)
        assert torch.equal(scale[e], alone_scale)
        torch.testing.assert_close(scale[e], matrix.abs().mean())
    one_scale_for_all = (stack / stack.abs().mean()).round().clamp(-1, 1).to(torch.int8)
    assert not torch.equal(codes, one_scale_for_all)


def test_bf16_is_quantised_in_fp32():
    weight, x = torch.randn(33, 65).bfloat16(), torch.randn(9, 65).bfloat16()
    for quantise, values in ((ternary, weight), (int8_rows, x)):
        codes, scale = quantise(values)
        wanted, wanted_scale = quantise(values.float())
        assert scale.dtype == torch.float32
        assert torch.equal(codes, wanted)
        assert torch.equal(scale, wanted_scale)


def test_zero_constant_and_outlier_rows_have_the_codes_one_expects():
    rows = torch.zeros(4, 6)
    rows[1], rows[2], rows[3] = 3.0, -2.0, torch.tensor([1e30, 1.0, -5.0, 0, 7, -1e28])
    codes, scale = int8_rows(rows)
    assert codes[0].tolist() == [0] * 6 and float(scale[0]) == pytest.approx(1e-5 / 127)
    assert codes[1].tolist() == [127] * 6 and codes[2].tolist() == [-127] * 6
    assert codes[3].tolist() == [127, 0, 0, 0, 0, -1]
    torch.testing.assert_close(codes[1:] * scale[1:], rows[1:], rtol=1e-2, atol=1e28)
    assert ternary(torch.zeros(3, 4))[0].abs().max() == 0
    assert ternary(torch.full((3, 4), -0.2))[0].tolist() == [[-1] * 4] * 3


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 1.0, 1e5, 1e30])
def test_the_code_minus_128_never_occurs(scale):
    x = scale * torch.randn(64, 63)
    codes = int8_rows(torch.cat([x, -x]))[0]
    assert int(codes.min()) >= -127 and int(codes.max()) <= 127
    if scale >= 1e-3:
        assert (codes.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_row_or_a_matrix_that_is_not_finite_gives_nan_and_touches_no_other(broken):
    x, weight = torch.randn(3, 8), torch.randn(2, 5, 8)
    x[1, 2] = broken
    codes, scale = int8_rows(x)
    assert torch.isnan(scale[1]).all() and codes[1].abs().max() == 0
    assert torch.isfinite(scale[[0, 2]]).all()
    assert torch.equal(codes[0], int8_rows(x[:1])[0][0])
    assert torch.isnan(int8_row_values(x)[0][1]).all()
    weight[1, 0, 0] = broken
    _, scale = ternary(weight)
    assert torch.isfinite(scale[0]) and not torch.isfinite(scale[1])
    assert not torch.isfinite(ternary_values(weight)[1][1])


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 1), (7, 5), (3, 9, 4), (2, 3, 6, 5), (0, 3)])
def test_unpacking_gives_back_what_was_packed(shape):
    codes = codes_of(*shape)
    packed = pack_hf(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-2], -(-shape[-2] // 4), shape[-1])
    assert torch.equal(unpack_hf(packed, shape[-2]), codes)


def test_the_bytes_of_the_hugging_face_layout_are_known():
    codes = torch.tensor([[-1, 0], [1, 1], [0, -1], [1, 0], [0, 1], [-1, -1], [1, 1], [0, 0]], dtype=torch.int8)
    # Byte (0, 0): rows 0, 2, 4, 6 = -1, 0, 0, 1, so codes 0, 1, 1, 2 from the lowest bits up.
    assert pack_hf(codes).tolist() == [[0b10_01_01_00, 0b10_10_00_01], [0b01_00_10_10, 0b01_00_01_10]]


def test_the_bytes_of_the_bitnet_cpp_layout_are_known():
    codes = torch.zeros(2, 128, dtype=torch.int8)
    codes[0, 0], codes[0, 32], codes[0, 64], codes[0, 96] = -1, 1, 0, -1
    codes[1, 31], codes[1, 127] = 1, -1
    packed = pack_i2_s(codes, 0.5)
    assert len(packed) == 2 * 32 + 32
    assert packed[0] == 0b00_10_01_00 and packed[1] == 0b01_01_01_01 and packed[63] == 0b10_01_01_00
    assert packed[64:68].tolist() == [0, 0, 0, 0x3F] and not packed[68:].any()
    back, scale = unpack_i2_s(packed, (2, 128))
    assert torch.equal(back, codes) and scale == 0.5
    more = codes_of(8, 48)
    assert torch.equal(unpack_i2_s(pack_i2_s(more, 2.0), (8, 48))[0], more)


def test_bytes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot hold num_rows=9"):
        unpack_hf(torch.zeros(2, 3, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="none of -1, 0, 1"):
        unpack_hf(torch.full((2, 3), 0b11, dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match="128 weights at a time"):
        pack_i2_s(codes_of(3, 5), 1.0)
    with pytest.raises(ValueError, match="no I2_S matrix of 4 x 32"):
        unpack_i2_s(torch.zeros(32, dtype=torch.uint8), (4, 32))
