"""The fragments of `mma.sp`: exact both ways, and where the PTX ISA wants them.

`mma_sp` below is the instruction m16n8k32 for 16 bits, lane by lane, and `mma_sp_int8` m16n8k64 for 8 bits, written
from the figures of the PTX ISA ("Matrix Fragments for sparse mma.m16n8k32", "… m16n8k64", "Sparse matrix storage"), not
from the packer. Masks are random: a layout that is wrong can pass with one non-zero at a time.
"""

import numpy as np
import pytest
import torch
from sparsekit_kernels import fragments24, layout24, quant

SHAPES = [(16, 256), (48, 768), (1, 1), (10, 1000), (34, 260), (17, 33)]
DTYPES = {
    "semi24": [torch.bfloat16, torch.float16], "semi24_fp8": [torch.float8_e4m3fn],
    "semi24_int8": [torch.int8], "semi24_int4": [torch.uint8],
}  # fmt: skip


def random24(N, K):
    """A float32 weight with a random mask: two, one or none of each four are kept; some of those are zeros."""
    w = torch.randn(N, -(-K // 4), 4)
    order = torch.rand_like(w).argsort(-1).argsort(-1)
    w *= order < torch.randint(0, 5, w.shape[:2] + (1,)).clamp(max=2)
    w[torch.rand_like(w) < 0.05] *= -0.0
    return w.view(N, -1)[:, :K].contiguous()


def canonical(format, dtype, N, K):
    """(values, meta) with every bit pattern that the format allows among the values."""
    values, meta = layout24.compress24(random24(N, K))
    if format == "semi24":
        return torch.randint(-(2**15), 2**15, values.shape).to(torch.int16).view(dtype), meta
    width = values.shape[1] // 2 if format == "semi24_int4" else values.shape[1]
    return torch.randint(0, 256, (N, width), dtype=torch.uint8).view(dtype), meta


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", fragments24.FORMATS)
def test_there_and_back(format, gated):
    torch.manual_seed(0)
    for dtype in DTYPES[format]:
        for N, K in SHAPES:
            N += N % 2
            values, meta = canonical(format, dtype, N, K)
            fragments, metadata = fragments24.prepare(values, meta, format, gated)
            T, S = fragments24.num_tiles(N, gated), fragments24.num_steps(K)
            assert fragments.shape == (T, S, fragments24.CHUNKS[format], 32, 4) and fragments.dtype == torch.int32
            assert metadata.shape == (T, S, 32, 4) and metadata.dtype == torch.int32
            back = fragments24.restore(fragments, metadata, format, N, K, dtype, gated)
            assert back[0].dtype == dtype and torch.equal(back[0].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(back[1], meta)
            scales = torch.randn(N, -(-K // 128)).bfloat16()
            packed = fragments24.prepare_scales(scales, gated)
            assert packed.shape == (T, S, 2, 8)
            assert torch.equal(fragments24.restore_scales(packed, N, K, gated), scales)


def test_no_rows():
    values, meta = layout24.compress24(torch.zeros(0, 512, dtype=torch.bfloat16))
    fragments, metadata = fragments24.prepare(values, meta, "semi24")
    assert fragments.shape == (0, 2, 8, 32, 4)
    assert fragments24.restore(fragments, metadata, "semi24", 0, 512, torch.bfloat16)[0].shape == (0, 256)


def test_bytes_are_the_canonical_ones():
    for format, bits in (("semi24", 9), ("semi24_fp8", 5), ("semi24_int8", 5), ("semi24_int4", 3)):
        values, meta = canonical(format, DTYPES[format][0], 64, 1024)
        fragments, metadata = fragments24.prepare(values, meta, format)
        assert 4 * 8 * (fragments.numel() + metadata.numel()) == bits * 64 * 1024


def test_padding_is_legal_metadata():
    values, meta = canonical("semi24", torch.float16, 3, 20)
    _, metadata = fragments24.prepare(values, meta, "semi24")
    assert layout24.count_illegal_nibbles(metadata.view(torch.uint8)) == 0


def mma_sp(a, b, c, metadata, selector):
    """D [32 lanes, 4] of mma.sp.m16n8k32: a, b [32 lanes, 8] 16-bit elements as numbers, c [32, 4], metadata [32]."""
    A, B, D = np.zeros((16, 32)), np.zeros((32, 8)), np.zeros((32, 4))
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            first_column = thread * 4 if i < 4 else thread * 4 + 16
            # The two lanes of a quad that the selector names hold the metadata of its two rows: the first one that of
            # columns 0-15, the other that of 16-31; two bits an element, 16 bits a row.
            word = int(metadata[group * 4 + 2 * selector + first_column // 16])
            shift = (16 if row >= 8 else 0) + first_column % 16 // 4 * 4 + i % 2 * 2
            A[row, first_column + (word >> shift & 3)] += a[lane, i]
            B[thread * 2 + i % 2 + i // 2 * 8, group] = b[lane, i]
    product = A @ B
    for lane in range(32):
        for i in range(4):
            row, column = (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2
            D[lane, i] = c[lane, i] + product[row, column]
    return D


def registers(format, chunk, columns):
    """The eight numbers of each lane for 32 columns of a chunk, [32 lanes, 4 words] uint32, as the docstring has it."""
    a = np.zeros((32, 4, 2))
    for lane in range(32):
        for r in range(4):
            for slot in range(2):
                if format == "semi24":
                    bits = int(chunk[lane, r]) >> 16 * slot & 0xFFFF
                    a[lane, r, slot] = np.uint16(bits).view(np.float16)
                elif format == "semi24_int4":
                    a[lane, r, slot] = (int(chunk[lane, columns]) >> 4 * (r + 4 * slot) & 15) - 8
                else:
                    byte = int(chunk[lane, 2 * columns + r // 2]) >> 8 * (r % 2 + 2 * slot) & 0xFF
                    dtype = torch.int8 if format == "semi24_int8" else torch.float8_e4m3fn
                    a[lane, r, slot] = torch.tensor(byte, dtype=torch.uint8).view(dtype).float().item()
    return a.reshape(32, 8)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", fragments24.FORMATS)
def test_the_instruction_computes_the_product(format, gated):
    """y of one row tile, from the packed words by way of the ISA's figures, against float64 on random masks."""
    torch.manual_seed(1)
    N, K, tile = 30, 500, 1
    values, meta = layout24.compress24(random24(N, K).half())
    if format != "semi24":
        values, _ = quant.quantize24(values, format, K)
    fragments, metadata = (t.numpy().view(np.uint32) for t in fragments24.prepare(values, meta, format, gated))
    x = np.zeros((8, fragments24.num_steps(K) * 256))
    x[:, :K] = np.random.default_rng(0).standard_normal((8, K))
    per_chunk = 8 // fragments24.CHUNKS[format]
    D = np.zeros((32, 4))
    for step in range(x.shape[1] // 256):
        for column in range(8):
            start = step * 256 + column * 32
            b = np.zeros((32, 8))
            for lane in range(32):
                for i in range(8):
                    b[lane, i] = x[lane >> 2, start + lane % 4 * 2 + i % 2 + i // 2 * 8]
            a = registers(format, fragments[tile, step, column // per_chunk], column % per_chunk)
            D = mma_sp(a, b, D, metadata[tile, step, :, column // 2], column % 2)
    ones = torch.ones(quant.GRIDS[format].scale_shape(N, K)) if format != "semi24" else None
    dense = values if ones is None else quant.dequantize24(values, ones, format, K, torch.float32)
    y = x[:, :K] @ layout24.decompress24(dense.float(), meta, K).double().numpy().T
    rows = range(16 * tile, 16 * tile + 16) if not gated else [*range(8, 16), *range(23, 31)]
    for lane in range(32):
        for i in range(4):
            n = rows[(lane >> 2) + (8 if i >= 2 else 0)]
            missing = n >= (N if not gated or n >= 23 else 15)
            want = 0.0 if missing else y[lane % 4 * 2 + i % 2, n]
            assert abs(D[lane, i] - want) < 1e-9 * max(1.0, abs(want)), (lane, i)


def mma_sp_int8(a, b, c, metadata):
    """D [32 lanes, 4] of mma.sp.m16n8k64 for s8: a, b [32 lanes, 16] int8, c [32, 4], metadata [32] uint32."""
    A, B, D = np.zeros((16, 64), np.int64), np.zeros((64, 8), np.int64), np.zeros((32, 4), np.int64)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(16):
            row = group if i < 4 or 8 <= i < 12 else group + 8
            first_column = thread * 8 + i % 4 // 2 * 4 + (0 if i < 8 else 32)  # of the four that share two elements
            # Lanes 0 and 1 of a quad have the metadata of columns 0-31, lanes 2 and 3 that of 32-63, even lanes row g
            # and odd lanes row g + 8, two bits an element.
            word = int(metadata[group * 4 + first_column // 32 * 2 + row // 8])
            shift = first_column % 32 // 4 * 4 + i % 2 * 2
            place = first_column + (word >> shift & 3)
            assert i % 2 == 0 or word >> shift - 2 & 3 < word >> shift & 3, "indices must ascend"
            A[row, place] += int(a[lane, i])
            B[thread * 4 + i % 4 + i // 4 * 16, group] = int(b[lane, i])
    product = A @ B
    for lane in range(32):
        for i in range(4):
            D[lane, i] = c[lane, i] + product[(lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2]
    return D


@pytest.mark.parametrize("gated", [False, True])
def test_the_integer_instruction_computes_the_product(gated):
    """The same words as m16n8k64 takes them, by the section "Eight bits on m16n8k64": exact, on random masks."""
    torch.manual_seed(2)
    N, K, tile = 30, 500, 1
    values, meta = layout24.compress24(random24(N, K))
    values = torch.randint(-128, 128, values.shape, dtype=torch.int8)
    fragments, metadata = fragments24.prepare(values, meta, "semi24_int8", gated)
    chunks = fragments.numpy().view(np.int8).reshape(*fragments.shape[:4], 16)
    halves = metadata.numpy().view(np.uint16).reshape(*metadata.shape[:2], 32, 4, 2)
    x = np.zeros((8, fragments24.num_steps(K) * 256), np.int64)
    x[:, :K] = np.random.default_rng(0).integers(-128, 128, (8, K))
    D = np.zeros((32, 4), np.int64)
    for step, unit in np.ndindex(x.shape[1] // 256, 4):
        a, b, words = np.zeros((32, 16), np.int8), np.zeros((32, 16), np.int64), np.zeros(32, np.uint32)
        for lane in range(32):
            t = lane % 4
            for r in range(4):
                taken = [8 * (r // 2) + r % 2 + 2 * n for n in range(4)]
                a[lane, 4 * r : 4 * r + 4] = chunks[tile, step, unit, lane, taken]
                group = 8 * (r // 2) + 2 * (r % 2) + t // 2 + 4 * (t % 2)
                start = step * 256 + unit * 64 + group * 4
                b[lane, 4 * r : 4 * r + 4] = x[lane // 4, start : start + 4]
            even, odd = (int(halves[tile, step, lane // 2 * 2 + n, unit, t % 2]) for n in range(2))
            for n in range(4):
                words[lane] |= (even >> 4 * n & 15 | (odd >> 4 * n & 15) << 4) << 8 * n
        D = mma_sp_int8(a, b, D, words)
    y = x[:, :K] @ layout24.decompress24(values, meta, K).numpy().astype(np.int64).T
    rows = range(16 * tile, 16 * tile + 16) if not gated else [*range(8, 16), *range(23, 31)]
    for lane in range(32):
        for i in range(4):
            n = rows[(lane >> 2) + (8 if i >= 2 else 0)]
            missing = n >= (N if not gated or n >= 23 else 15)
            assert D[lane, i] == (0 if missing else y[lane % 4 * 2 + i % 2, n]), (lane, i)


def test_scales_of_int4_lie_where_the_rows_are():
    scales = torch.arange(40 * 5).view(40, 5).bfloat16()
    words = fragments24.prepare_scales(scales).numpy().view(np.uint32)
    for tile, step, b, g in np.ndindex(3, 3, 2, 8):
        for half in range(2):
            n, group = 16 * tile + g + 8 * half, 2 * step + b
            want = scales[n, group].item() if n < 40 and group < 5 else 0.0
            bits = np.uint32(int(words[tile, step, b, g]) >> 16 * half & 0xFFFF) << np.uint32(16)
            assert np.uint32(bits).view(np.float32) == want


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(format="semi25"), "semi25"),
        (dict(values=torch.zeros(4, 16)), "float32"),
        (dict(values=torch.zeros(4, 12, dtype=torch.float16)), "belong together"),
        (dict(meta=torch.zeros(4, 4, dtype=torch.int8)), "int8"),
        (dict(values=torch.zeros(3, 16).half(), meta=torch.zeros(3, 4, dtype=torch.uint8), gated=True), "gate"),
    ],
)
def test_bad_input(change, message):
    good = dict(
        values=torch.zeros(4, 16, dtype=torch.float16), meta=torch.zeros(4, 4, dtype=torch.uint8), format="semi24"
    )
    fragments24.prepare(**good)
    with pytest.raises(ValueError, match=message):
        fragments24.prepare(**(good | change))


def test_restore_refuses_other_shapes():
    values, meta = canonical("semi24", torch.float16, 16, 256)
    fragments, metadata = fragments24.prepare(values, meta, "semi24")
    with pytest.raises(ValueError, match="expected"):
        fragments24.restore(fragments, metadata, "semi24", 17, 256, torch.float16)
