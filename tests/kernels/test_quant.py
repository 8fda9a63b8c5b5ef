"""The grids of the quantised formats, against plain Python on small weights."""

import itertools
import math

import pytest
import torch
from sparsekit_kernels.layout24 import compress24
from sparsekit_kernels.quant import GRIDS, INT4_COLUMNS, dequantize24, find_scales, quantize24

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 7), (5, 128), (4, 129), (17, 1000), (0, 64), (6, 0)]


def kept_values(N, K, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator)
    for start in range(0, K, 4):
        w[:, start : start + 2] = 0
    return compress24(w.to(dtype))[0]


def stored_numbers(q, format, n, slot):
    """q of one slot, read from the bytes as the module's table says."""
    if format != "semi24_int4":
        return float(q[n, slot].float())
    nibble = int(q[n, slot // 2]) >> 4 * (slot % 2) & 15
    return nibble - 16 if nibble >= 8 else nibble


@pytest.mark.parametrize("format,dtype,shape", list(itertools.product(GRIDS, DTYPES, SHAPES)), ids=str)
def test_every_number_is_the_nearest_of_its_grid(format, dtype, shape):
    N, K = shape
    values = kept_values(N, K, dtype)
    q, scales = quantize24(values, format, K)
    grid = GRIDS[format]
    assert q.shape == grid.value_shape(N, K) and q.dtype == grid.storage
    assert scales.shape == grid.scale_shape(N, K) and scales.dtype == grid.scale_dtype
    back = dequantize24(q, scales, format, K, torch.float32)
    assert back.shape == values.shape
    for n in range(min(N, 5)):
        for slot in range(values.shape[1]):
            scale = float(scales[n] if format != "semi24_int4" else scales[n, slot // (INT4_COLUMNS // 2)])
            number, value = stored_numbers(q, format, n, slot), float(values[n, slot])
            assert abs(number) <= grid.largest
            assert math.isclose(float(back[n, slot]), number * scale, rel_tol=1e-6, abs_tol=1e-30)
            if format == "semi24_fp8":
                step = max(2.0 ** (math.floor(math.log2(abs(value / scale))) - 3), 2**-9) if value else 0
            else:
                step = 1
            assert abs(value / scale - number) <= step / 2 * (1 + 1e-5) + 0.02 * (abs(number) == grid.largest)


@pytest.mark.parametrize("format", GRIDS)
def test_the_largest_of_each_scale_uses_the_whole_grid(format):
    values = kept_values(9, 300, torch.float32)
    q, scales = quantize24(values, format, 300)
    largest = [stored_numbers(q, format, n, int(values[n, :64].abs().argmax())) for n in range(9)]
    if format == "semi24_int4":
        assert {abs(number) for number in largest} == {7}
    assert torch.equal(scales, find_scales(values, format, 300))


@pytest.mark.parametrize("format,dtype", list(itertools.product(GRIDS, DTYPES)), ids=str)
def test_what_lies_on_the_grid_stays(format, dtype):
    """Dense weights read back from a packed layer and packed again, on the same scales."""
    values = kept_values(8, 260, dtype)
    q, scales = quantize24(values, format, 260)
    back = dequantize24(q, scales, format, 260, dtype)
    again, _ = quantize24(back, format, 260, scales)
    assert torch.equal(dequantize24(again, scales, format, 260, dtype), back)
    if dtype == torch.float32:
        assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))


@pytest.mark.parametrize("format", GRIDS)
def test_rows_of_zeros_and_of_tiny_numbers(format):
    values = torch.zeros(3, 64)
    values[1] = 1e-42  # a denormal: its scale is not a number that bfloat16 has
    q, scales = quantize24(values, format, 128)
    assert (scales > 0).all() and scales.isfinite().all()
    assert not dequantize24(q, scales, format, 128, torch.float32)[0].any()


def test_given_scales_clip_and_wrong_ones_are_refused():
    values = torch.tensor([[3.0, -300.0, 0.4, 0.6]])
    q, scales = quantize24(values, "semi24_int8", 8, torch.ones(1))
    assert q.tolist() == [[3, -127, 0, 1]] and scales.tolist() == [1.0]
    half_up = quantize24(torch.tensor([[0.5, 1.5, -0.5, 2.5]]), "semi24_int8", 8, torch.ones(1))[0]
    assert half_up.tolist() == [[0, 2, 0, 2]]
    with pytest.raises(ValueError, match=r"scales are \(2,\), semi24_int8 of \[1, 8\] has \(1,\)"):
        quantize24(values, "semi24_int8", 8, torch.ones(2))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            quantize24(values, "semi24_int8", 8, torch.tensor([wrong]))
    with pytest.raises(ValueError, match="not quantised: expected one of semi24_int8"):
        quantize24(values, "semi24", 8)
    with pytest.raises(ValueError, match="the slots of K=100"):
        quantize24(values, "semi24_int8", 100)
