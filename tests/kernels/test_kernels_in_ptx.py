"""The kernels as ptxas gets them: compiled for real GPUs, then executed instruction by instruction on the CPU.

What the interpreter cannot show is shown here: the layouts that inline PTX relies on, fragments and metadata, masks,
barriers and asynchronous copies, for each generation. References are float64. Kernels whose `tl.dot` becomes wgmma on
sm_90, which the emulator does not know, run as on sm_80 and sm_120.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit_kernels import (
    compress24,
    decompress_fragments24,
    fragments24,
    layout24,
    layout_block,
    quant,
    quantize_tokens,
    spmm24,
    spmm24_mma,
    spmm_block,
    target,
)

from tests.kernels.ptx import emulated

pytestmark = pytest.mark.skipif(target.INTERPRETED, reason="Triton interprets here; these tests compile")

HALF_ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def random24(N, K, dtype):
    """A weight with a random mask: two, one or none of each four are kept; some of those are -0.0."""
    w = torch.randn(N, K)
    order = torch.rand(N, -(-K // 4), 4).argsort(-1).argsort(-1)
    w *= (order < torch.randint(0, 5, order.shape[:2] + (1,)).clamp(max=2)).view(N, -1)[:, :K]
    w[torch.rand(N, K) < 0.05] *= -0.0
    return w.to(dtype)


def strided(M, K, dtype):
    """x [M, K] in rows that are longer, NaN between them."""
    x = torch.full((M, K + 8), torch.nan, dtype=dtype)
    x[:, :K] = torch.randn(M, K)
    return x[:, :K]


def product(x, w, *addends):
    """x @ w.T + addends in float64, and the same of absolute values: what rounding errors are in proportion to."""
    x, w = x.double(), w.double()
    y, size = x @ w.T, x.abs() @ w.abs().T
    for addend in addends:
        y, size = y + addend.double(), size + addend.double().abs()
    return y, size


def assert_near(y, reference, size):
    """y is the reference but for sums in float32, of terms as large as `size`, and one rounding of the result."""
    assert y.shape == reference.shape
    excess = (y.double() - reference).abs() - (1.01 * HALF_ULP[y.dtype] * reference.abs() + 2**-20 * size + 1e-7)
    assert (excess <= 0).all(), f"off by {excess.max():.3g} at {(~(excess <= 0)).nonzero()[:8].tolist()}"


def bits(t):
    return t.contiguous().view(torch.uint8)


# The portable kernel


@pytest.mark.parametrize(
    "capability,M,N,K,dtype",
    [
        ((8, 0), 1, 70, 1048, torch.bfloat16),  # two splits
        ((12, 0), 5, 131, 264, torch.float16),
        ((8, 0), 33, 130, 501, torch.bfloat16),
        ((12, 0), 64, 17, 40, torch.bfloat16),
        ((8, 0), 3, 66, 77, torch.float32),
        ((12, 0), 2, 66, 280, torch.float32),
    ],
)
def test_spmm24(capability, M, N, K, dtype):
    torch.manual_seed(M)
    w = random24(N, K, dtype)
    values, meta = layout24.compress24(w)
    x, bias = strided(M, K, dtype), torch.randn(N).to(dtype)
    with emulated(capability) as counts:
        y = spmm24.spmm24_small(x, values, meta, bias)
        dense = spmm24.decompress24(values, meta, K)
    assert K < 200 or any(opcode.startswith("cp.async") for opcode in counts)
    assert dtype == torch.float32 or any(opcode.startswith("mma.sync") for opcode in counts)
    assert torch.equal(bits(dense), bits(layout24.decompress24(values, meta, K)))
    assert_near(y, *product(x, w, bias))


# The sparse tensor cores

FORMATS = {
    "semi24": spmm24_mma.spmm24,
    "semi24_fp8": spmm24_mma.spmm24_fp8,
    "semi24_int8": spmm24_mma.spmm24_int8,
    "semi24_int4": spmm24_mma.spmm24_int4,
}


def random_codes(format, shape):
    """Any stored number of a quantised format."""
    if format == "semi24_int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    if format == "semi24_fp8":
        codes = torch.randint(0, 254, shape, dtype=torch.uint8)
        return (codes + (codes > 126)).view(torch.float8_e4m3fn)  # 127 and 255 are NaN
    low, high = torch.randint(-7, 8, (2, *shape), dtype=torch.int8).view(torch.uint8) & 15
    return low | high << 4


def fragments(format, N, K, dtype, gated=False):
    """(what the entry point takes between x and N, the weight that it stands for)."""
    values, meta = layout24.compress24(random24(N, K, dtype))
    if format == "semi24":
        return fragments24.prepare(values, meta, format, gated), layout24.decompress24(values, meta, K)
    grid = quant.GRIDS[format]
    q = random_codes(format, grid.value_shape(N, K))
    scales = torch.rand(grid.scale_shape(N, K)) * 2.0 ** torch.randint(-6, 3, grid.scale_shape(N, K)) / grid.largest
    scales = scales.to(grid.scale_dtype)
    w = layout24.decompress24(quant.dequantize24(q, scales, format, K, torch.float32), meta, K)
    if format == "semi24_int4":
        scales = fragments24.prepare_scales(scales, gated)
    return (*fragments24.prepare(q, meta, format, gated), scales), w


def assert_multiplies(format, M, N, K, dtype, gated=False, plain=False, config=None):
    """One call, then a second one with other numbers: the wrapper goes another way once it knows the shape."""
    operands, w = fragments(format, N, K, dtype, gated)
    features = N // 2 if gated else N
    for _ in range(2):
        x, bias, residual = strided(M, K, dtype), torch.randn(N).to(dtype), torch.randn(M, features).to(dtype)
        if plain:
            y = FORMATS[format](x, *operands, N, config=config)
            assert_near(y, *product(x, w))
            continue
        activation = "silu_mul" if gated else None
        y = FORMATS[format](x, *operands, N, bias, activation=activation, residual=residual, config=config)
        if gated:
            (gate, up), (gate_size, up_size) = (z.split(features, 1) for z in product(x, w, bias))
            reference = F.silu(gate) * up + residual.double()
            size = (gate_size + 4) * (up_size + 1) + residual.double().abs()
        else:
            reference, size = product(x, w, bias, residual)
        assert_near(y, reference, size)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("format", FORMATS)
def test_mma_decode(format, capability):
    """Eight tokens an instruction; odd N and K, one token and more than a block has, with and without split K."""
    torch.manual_seed(capability[0])
    dtype = torch.float16 if capability == (9, 0) else torch.bfloat16
    config = spmm24_mma.CONFIGS[format][8]
    with emulated(capability) as counts:
        for M, N, K in [(1, 37, 300), (3, 16 * config.ROW_TILES + 1, 2 * 2048 + 263), (8, 7, 33), (11, 130, 1003)]:
            assert_multiplies(format, M, N, K, dtype, config=config)
        if capability == (9, 0):
            for M, N, K in [(1, 33, 5000), (5, 18, 2049)]:
                assert_multiplies(format, M, N, K, dtype, config=replace(config, SPLIT_K=2))
        used = {opcode for opcode in counts if opcode.startswith("mma")}
    modifier = "::ordered_metadata" if capability >= (10, 0) else ""
    kind = "f16" if dtype == torch.float16 else "bf16"
    assert used == {f"mma.sp{modifier}.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32"}


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("format", FORMATS)
def test_mma_epilogues(format, tokens):
    """The shipped configs, with gate and up interleaved or without; generations and dtypes take turns."""
    turn = list(FORMATS).index(format) + tokens.bit_length()
    torch.manual_seed(turn)
    capability, dtype = [(8, 0), (9, 0), (12, 0)][turn % 3], [torch.float16, torch.bfloat16][turn // 2 % 2]
    gated = tokens == 8 or turn % 2 == 0
    config = spmm24_mma.CONFIGS[format][tokens]
    with emulated(capability):
        assert_multiplies(format, tokens - 5, 202, 301, dtype, gated)
        if tokens == 16:  # the other way to read x, and more blocks of tokens than one
            assert_multiplies(format, 23, 70, 521, dtype, gated, config=replace(config, PACKED_X=not config.PACKED_X))


@pytest.mark.parametrize("format", FORMATS)
def test_mma_whole_shapes(format):
    """Nothing to mask: K of whole steps, N of whole tiles, M of whole blocks; no bias and no residual."""
    torch.manual_seed(0)
    config = spmm24_mma.CONFIGS[format][8]
    with emulated((9, 0)):
        assert_multiplies(format, 8, 64, 256 * config.WARPS_K, torch.bfloat16, plain=True, config=config)


@pytest.mark.parametrize("format", FORMATS)
def test_decompress(format):
    """Back to the dense weight, bit for bit, with rows and columns that end inside a tile."""
    torch.manual_seed(0)
    dtype = torch.float16 if format == "semi24_int4" else torch.bfloat16
    with emulated((9, 0)):
        for N, K, gated in [(21, 300, False), (10, 257, True), (16, 512, False)]:
            operands, w = fragments(format, N, K, dtype, gated)
            scales = operands[2] if len(operands) > 2 else None
            found = decompress_fragments24.decompress(
                *operands[:2], N, K, dtype, format=format, scales=scales, gated=gated
            )
            assert torch.equal(bits(found), bits(w.to(dtype)))


def columns_apart(t):
    """t with other numbers between its elements."""
    return torch.stack([t, t + 1], -1)[..., 0]


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_mma_with_a_strided_bias(format, split):
    """And a residual that is strided, on the first call and on a later one."""
    torch.manual_seed(split)
    operands, w = fragments(format, 37, 4700, torch.float16)
    config = replace(spmm24_mma.CONFIGS[format][8], SPLIT_K=split)
    with emulated((9, 0)):
        for _ in range(2):
            x, bias, residual = (torch.randn(*shape).half() for shape in ((3, 4700), (37,), (37, 3)))
            bias, residual = columns_apart(bias), residual.T
            assert not bias.is_contiguous() and not residual.is_contiguous()
            y = FORMATS[format](x, *operands, 37, bias, residual=residual, config=config)
            assert_near(y, *product(x, w, bias, residual))


@pytest.mark.parametrize("format", FORMATS)
def test_mma_refuses_strided_scales_and_misaligned_is_no_matter(format):
    """Fragments that begin between multiples of 16 bytes give the same bits, after a call with others."""
    torch.manual_seed(0)
    (values, metadata, *scales), _ = fragments(format, 21, 300, torch.float16)
    x, shifted = torch.randn(2, 300).half(), torch.zeros(values.numel() + 1, dtype=torch.int32)[1:].view(values.shape)
    shifted.copy_(values)
    with emulated((9, 0)):
        expected = FORMATS[format](x, values, metadata, *scales, 21)
        assert torch.equal(bits(FORMATS[format](x, shifted, metadata, *scales, 21)), bits(expected))
        for wrong in map(columns_apart, scales):
            with pytest.raises(ValueError, match="scales .* with strides .*: expected contiguous"):
                FORMATS[format](x, values, metadata, wrong, 21)


def test_what_is_not_a_number_counts_where_a_weight_is_kept():
    """inf or NaN at a pruned column: a dense product has NaN, the sparse one what the kept columns give."""
    torch.manual_seed(0)
    w = torch.randn(20, 256).half()
    w.view(20, -1, 4)[:10, :, 2:] = 0
    w.view(20, -1, 4)[10:, :, :2] = 0
    operands = fragments24.prepare(*layout24.compress24(w), "semi24")
    x = torch.randn(2, 256).half()
    clean = x.clone()
    x[0, 3], x[1, 102], clean[0, 3], clean[1, 102] = torch.inf, torch.nan, 0, 0
    with emulated((9, 0)):
        y = spmm24_mma.spmm24(x, *operands, 20)
    assert (x.double() @ w.double().T)[:, :10].isnan().all(), "the dense product"
    reference, size = product(clean, w)
    assert_near(y[:, :10], reference[:, :10], size[:, :10])
    assert torch.equal(y[0, 10:], (w[10:, 3] * torch.inf)) and y[1, 10:].isnan().all()


def transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("format", FORMATS)
def test_decompress_refuses_strides_and_wrong_scales(format):
    (values, metadata, *scales), _ = fragments(format, 21, 300, torch.bfloat16)
    scales = scales[0] if scales else None

    def decompress(values=values, metadata=metadata, scales=scales):
        return decompress_fragments24.decompress(
            values, metadata, 21, 300, torch.bfloat16, format=format, scales=scales
        )

    with emulated((9, 0)):
        for change in (dict(values=transposed(values)), dict(metadata=transposed(metadata))):
            with pytest.raises(ValueError, match=r"with strides .* are not W \[21, 300\].*expected contiguous"):
                decompress(**change)
        if scales is None:
            with pytest.raises(ValueError, match="semi24 has no scales"):
                decompress(scales=torch.ones(21))
            return
        for wrong in (columns_apart(scales), scales[:-1], scales.double()):
            with pytest.raises(ValueError, match="scales .*: expected contiguous"):
                decompress(scales=wrong)
        with pytest.raises(ValueError, match="needs scales"):
            decompress(scales=None)


# int8 weights times int8 x


def assert_multiplies_int8(M, N, K, config, gated=False, plain=False, dtype=torch.bfloat16):
    """One call, then a second one with other numbers. Without addends the result is exact, and so is its rounding."""
    (fragments_, metadata, scales), w = fragments("semi24_int8", N, K, torch.float32, gated)
    q = (w.double() / scales.double()[:, None]).round().to(torch.int64)
    features = N // 2 if gated else N
    for _ in range(2):
        x = torch.randint(-128, 128, (M, K + 7), dtype=torch.int8)[:, :K]  # what lies between its rows is not zero
        x_scales, options = torch.rand(M) / 64, {"config": config, "out_dtype": dtype}
        sums = x.to(torch.int64) @ q.T
        scaled = sums.float() * scales * x_scales[:, None]
        if plain:
            y = spmm24_mma.spmm24_int8(x, fragments_, metadata, scales, N, x_scales=x_scales, **options)
            assert y.dtype == dtype and torch.equal(bits(y), bits(scaled.to(dtype)))
            continue
        bias, residual = torch.randn(N).to(dtype), torch.randn(M, features).to(dtype)
        activation = "silu_mul" if gated else None
        y = spmm24_mma.spmm24_int8(
            x, fragments_, metadata, scales, N, bias, activation=activation, residual=residual, x_scales=x_scales,
            **options,
        )  # fmt: skip
        reference = scaled.double() + bias.double()
        size = reference.abs() + bias.double().abs()
        if gated:
            (gate, up), (gate_size, up_size) = (z.split(features, 1) for z in (reference, size))
            reference, size = F.silu(gate) * up, (gate_size + 4) * (up_size + 1)
        assert_near(y, reference + residual.double(), size + residual.double().abs())


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_int8_x(capability):
    """From 1 to 70 tokens, odd N and K, x as it lies and packed, with and without split K: bit for bit."""
    torch.manual_seed(capability[0])
    few, some, many = (spmm24_mma.CONFIGS["semi24_int8"][tokens] for tokens in (8, 16, 64))
    with emulated(capability) as counts:
        for M, N, K in [(1, 37, 300), (3, 33, 2 * 2048 + 263), (8, 7, 33), (11, 130, 1001)]:
            assert_multiplies_int8(M, N, K, few, plain=True)
        if capability == (8, 0):
            assert_multiplies_int8(5, 19, 2302, replace(few, SPLIT_K=2), plain=True)
            assert_multiplies_int8(23, 70, 270, some, gated=True, dtype=torch.float16)
        elif capability == (9, 0):
            assert_multiplies_int8(9, 67, 2049, replace(some, SPLIT_K=2))
            assert_multiplies_int8(70, 35, 771, many, plain=True)
        else:
            assert_multiplies_int8(3, 70, 515, few, gated=True)
        used = {opcode for opcode in counts if opcode.startswith("mma")}
    modifier = "::ordered_metadata" if capability >= (10, 0) else ""
    assert used == {f"mma.sp{modifier}.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32"}


def test_the_largest_sums_of_int8():
    """-128 times -127 in every kept place of a row as long as one may be: no wrap, and the float32 nearest to it."""
    K = spmm24_mma.MOST_INT8_COLUMNS
    values = torch.full((2, fragments24.num_steps(K) * 128), -127, dtype=torch.int8)
    values[:, K // 2 :] = 0
    meta = torch.full((2, values.shape[1] // 4), 0x44, dtype=torch.uint8)
    prepared = fragments24.prepare(values, meta, "semi24_int8")
    x, ones = torch.full((1, K), -128, dtype=torch.int8), torch.ones(2)
    with emulated((9, 0)):
        y = spmm24_mma.spmm24_int8(x, *prepared, ones, 2, x_scales=torch.full((1,), 2.0**-16))
    assert torch.equal(y, torch.full((1, 2), 128 * 127 * (K // 2) / 2**16).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_tokens(dtype):
    torch.manual_seed(0)
    with emulated((9, 0)):
        for shape in [(5, 301), (2, 3, 16), (1, 1), (2, 9001), (7,), (0, 5)]:
            x = (torch.randn(*shape[:-1], shape[-1] + 3) * 3).to(dtype)[..., : shape[-1]]
            if len(shape) == 2 and shape[0] == 5:
                x[0], x[1, 3], x[2, 300] = -0.0, torch.nan, -torch.inf
                x[3] = torch.arange(301) - 150
                x[3, 0] = 254  # a step of 2: halves everywhere
                x[3, 4:] -= x[3, 4:] % 2 - 1
                x[4] = x[4] * 1e-38 if dtype != torch.float16 else x[4] * 1e-5
            for _ in range(2):
                q, scales = quantize_tokens.quantize_tokens(x)
                largest = x.float().abs().amax(-1) if x.numel() else x.new_empty(x.shape[:-1]).float()
                expected = torch.where(largest == 0, 1.0, largest / 127)
                assert torch.equal(scales.nan_to_num(7.0, 8.0), expected.nan_to_num(7.0, 8.0))
                finite = torch.where(expected.isfinite()[..., None], x.float() / expected[..., None], 0.0)
                assert q.shape == x.shape and q.dtype == torch.int8
                assert torch.equal(q, finite.round().clamp(-127, 127).to(torch.int8))
                memory = q.as_strided((scales.numel(), -(-shape[-1] // 16) * 16), (-(-shape[-1] // 16) * 16, 1))
                assert not memory[:, shape[-1] :].any(), "zeros behind the rows"


@pytest.mark.parametrize("K", [301, 512])
def test_a_token_that_is_not_a_number_is_seen(K):
    """Quantised and multiplied: such rows are NaN, a row of zeros is the bias, others are near the float product."""
    torch.manual_seed(0)
    with emulated((9, 0)):
        (values, metadata, scales), w = fragments("semi24_int8", 20, K, torch.float32)
        x, bias = torch.randn(5, K).bfloat16(), torch.randn(20).bfloat16()
        x[0], x[1, 7], x[2, K - 1] = 0, torch.nan, torch.inf
        q, x_scales = quantize_tokens.quantize_tokens(x)
        y = spmm24_mma.spmm24_int8(q, values, metadata, scales, 20, bias, x_scales=x_scales)
    assert y[1:3].isnan().all() and torch.equal(y[0], bias)
    reference = x[3:].double() @ w.double().T + bias.double()
    assert (y[3:].double() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_split_k_gives_the_same_bits_in_any_order(order):
    torch.manual_seed(0)
    (values, metadata), _ = fragments("semi24", 50, 9000, torch.bfloat16)
    x, bias = torch.randn(4, 9000, dtype=torch.bfloat16), torch.randn(50).to(torch.bfloat16)
    with emulated((9, 0)) as counts:
        expected = spmm24_mma.spmm24(x, values, metadata, 50, bias)
    assert len(counts) and spmm24_mma.pick_config("semi24", 4, 50, 9000, 132).SPLIT_K > 1
    with emulated((9, 0), order=order, threads_at_once=1):
        y = spmm24_mma.spmm24(x, values, metadata, 50, bias)
    assert torch.equal(bits(y), bits(expected))


# The packer


@pytest.mark.parametrize(
    "capability,dtype", [((8, 0), torch.bfloat16), ((9, 0), torch.float32), ((12, 0), torch.float16)]
)
def test_packer(capability, dtype):
    torch.manual_seed(1)
    with emulated(capability):
        for N, K in [(5, 1032), (3, 17)]:
            w = random24(N, K, dtype)
            values, meta = compress24.compress24(w)
            expected = layout24.compress24(w)
            assert torch.equal(bits(values), bits(expected[0])) and torch.equal(meta, expected[1])
            w, scores = torch.randn(K, N).to(dtype).T, torch.randint(0, 4, (N, K)).float()  # strides; many ties
            found = compress24.search24(w, scores, keep=True, masked=True)
            rank = F.pad(scores, (0, -K % 4), value=-1).view(N, -1, 4)
            rank = rank.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            keep = (rank < 2).view(N, -1)[:, :K]
            assert torch.equal(found.keep, keep)
            assert torch.equal(found.masked, torch.where(keep, w, 0))
            expected = layout24.compress24(found.masked)
            assert torch.equal(bits(found.values), bits(expected[0])) and torch.equal(found.meta, expected[1])


# Blocks


@pytest.mark.parametrize(
    "capability,M,N,K,block,dtype",
    [
        ((8, 0), 1, 100, 330, (64, 64), torch.bfloat16),
        ((12, 0), 7, 200, 330, (32, 64), torch.float16),
        ((8, 0), 40, 130, 200, (64, 64), torch.bfloat16),
        ((8, 0), 100, 70, 210, (64, 32), torch.float16),
        ((12, 0), 100, 130, 200, (128, 128), torch.bfloat16),
        ((12, 0), 3, 70, 150, (16, 16), torch.float32),
    ],
)
def test_spmm_block(capability, M, N, K, block, dtype):
    torch.manual_seed(M)
    NB, KB = layout_block.block_grid(N, K, block)
    occupied = torch.rand(NB, KB) < 0.5
    occupied[-1] = False  # a block row of zeros
    w = torch.randn(N, K) * occupied.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    w = w.to(dtype)
    x, bias, residual = strided(M, K, dtype), torch.randn(N).to(dtype), torch.randn(M, N).to(dtype)
    with emulated(capability):
        prepared = spmm_block.prepare(*layout_block.compress_block(w, block), 132)
        y = spmm_block.spmm_block(x, prepared, N, bias, residual)
    assert_near(y, *product(x, w, bias, residual))


def test_a_cut_block_row_is_added_up():
    torch.manual_seed(0)
    w = torch.zeros(128, 4096)
    w[:64], w[64:, :64] = torch.randn(64, 4096), torch.randn(64, 64)
    for M in (1, 2):
        x = torch.randn(M, 4096)
        with emulated((8, 0)):
            prepared = spmm_block.prepare(*layout_block.compress_block(w, (64, 64)), 132)
            assert prepared[5].shape[0] == 1
            y = spmm_block.spmm_block(x, prepared, 128)
        assert_near(y, *product(x, w))
