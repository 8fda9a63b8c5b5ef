"""The quantised CPU kernels against float64, for every instruction set this machine has."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sparsekit_kernels import cpu, layout24

REASON = cpu.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "runs here")
DTYPES = (torch.bfloat16, torch.float32)
FORMATS = (8, 4)
TOKENS = (0, 1, 2, 3, 4, 5, 6, 7, 13, 16, 33, 130)


@pytest.fixture(params=cpu.ISAS)
def isa(request, monkeypatch):
    """Run the test on this instruction set."""
    monkeypatch.delenv("SPARSEKIT_CPU_ISA", raising=False)
    _forget()
    if cpu.ISAS.index(request.param) > cpu.ISAS.index(cpu.isa()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("SPARSEKIT_CPU_ISA", request.param)
    _forget()
    yield request.param
    monkeypatch.undo()
    _forget()


@pytest.fixture
def threads():
    """Change torch's number of threads, and change it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _forget():
    cpu.isa.cache_clear()
    cpu._spmm24.cache_clear()


class Weight:
    """A random quantised 2:4 weight in the canonical layout, prepared, and dense in float64."""

    def __init__(self, bits, N, K, seed=0, kept=(0, 1, 2, 3)):
        """Rows keep two of the columns `kept` of every four."""
        generator = torch.Generator().manual_seed(seed)
        Kp = layout24.padded_features(K)
        self.bits, self.N, self.K = bits, N, K
        top = 127 if bits == 8 else 7
        legal = [nibble for nibble in layout24.LEGAL_NIBBLES if nibble & 3 in kept and nibble >> 2 in kept]
        nibbles = torch.tensor(legal, dtype=torch.uint8)[torch.randint(len(legal), (N, Kp // 4), generator=generator)]
        q = torch.randint(-top, top + 1, (N, Kp // 2), generator=generator).to(torch.int8)
        q[torch.rand(N, Kp // 2, generator=generator) < 0.05] = top  # the ends of the range are seen
        q[torch.rand(N, Kp // 2, generator=generator) < 0.05] = -top
        columns = torch.arange(Kp // 4).mul(4)[:, None] + torch.stack((nibbles & 3, nibbles >> 2), dim=-1)
        columns = columns.reshape(N, Kp // 2).long()
        q[columns >= K] = 0  # columns that only fill the last group
        self.meta = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous()
        dense = torch.zeros(N, Kp, dtype=torch.float64).scatter_(1, columns, q.double())[:, :K]
        if bits == 8:
            self.values = q
            self.scales = torch.rand(N, generator=generator) * 0.02 + 1e-3
            self.dense64 = dense * self.scales.double()[:, None]
            self.prepared = (*cpu.prepare_int8(q, self.meta), self.scales)
        else:
            self.values = (q[:, 0::2] & 15 | q[:, 1::2] << 4).view(torch.uint8).contiguous()
            self.scales = (torch.rand(N, math.ceil(K / 128), generator=generator) * 0.2 + 1e-2).bfloat16()
            self.dense64 = dense * self.scales.double().repeat_interleave(128, 1)[:, :K]
            self.prepared = cpu.prepare_int4(self.values, self.meta, self.scales)

    def __call__(self, x, bias=None):
        product = cpu.spmm24_int8 if self.bits == 8 else cpu.spmm24_int4
        return product(x, *self.prepared, self.N, bias)

    def reference(self, x, bias=None):
        return x.double() @ self.dense64.T + (0 if bias is None else bias.double())


def assert_close(out, x, weight, bias=None, ulps=4):
    """The error of each y may be twice that of a bf16 or fp32 product of the very weight, in the worst case.

    A product in fp32 whose result is rounded is off by up to u |y|, and by some `ulps` of fp32 in the sum of |x w|,
    which is the bound that holds whatever cancels. Fixed point adds, for each block of 128 columns, half a step times
    the sum of |w|: X / 2^15 for bf16 and X / 2^23 for fp32, X the largest |x| of the block; and X / 2^30 and X / 2^46
    in blocks where more than a quarter of the non-zero |x| are below X / 128.
    """
    ref = weight.reference(x, bias)
    assert out.shape == ref.shape and out.dtype == x.dtype
    if out.numel() == 0:
        return
    assert out.isfinite().all(), "not finite"
    bf16 = x.dtype == torch.bfloat16
    K = weight.K
    blocks = F.pad(x.double().abs(), (0, -K % 128)).unflatten(-1, (-1, 128))
    top = blocks.amax(-1, keepdim=True)
    small = ((blocks > 0) & (blocks < top / 128)).sum(-1, keepdim=True)
    is_wide = 4 * small > (blocks > 0).sum(-1, keepdim=True)
    error_of_x = top * torch.where(is_wide, 1.02 * 2.0 ** (-30 if bf16 else -46), 1.01 * 2.0 ** (-15 if bf16 else -23))
    absolute = weight.dense64.abs().T
    fixed_point = error_of_x.expand_as(blocks).flatten(-2)[..., :K] @ absolute
    summing = (x.double().abs() @ absolute + (0 if bias is None else bias.double().abs())) * ulps * 2.0**-24
    limit = ref.abs() * 1.01 * 2.0 ** (-8 if bf16 else -24) + fixed_point + summing + 1e-30
    excess = ((out.double() - ref).abs() / limit).max()
    assert excess <= 1, f"error {excess:.3g} times the bound"


def assert_as_good_as_dense(out, dense, ref64):
    """`out` may be at most twice as far from the fp64 answer as torch's own dense result in the same dtype."""
    error, limit = (out.double() - ref64).abs().max(), 2 * (dense.double() - ref64).abs().max()
    assert error <= limit, f"error {error:.3g} > {limit:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(
    "N,K", [(1, 1), (3, 2), (17, 5), (130, 63), (32, 128), (17, 136), (1, 172), (70, 264), (33, 1000), (64, 4352)]
)
def test_matches_float64(N, K, bits, dtype, isa):
    torch.manual_seed(0)
    weight = Weight(bits, N, K)
    for M in TOKENS:
        x = torch.randn(M, K).to(dtype)
        for bias in (None, torch.randn(N).to(dtype)):
            assert_close(weight(x, bias), x, weight, bias)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("outliers", [0, 1, 16])
def test_no_worse_than_dense_bf16(bits, outliers, isa):
    torch.manual_seed(1)
    weight = Weight(bits, 256, 2048)
    for M in (1, 9):
        x = torch.randn(M, 2048)
        x[:, torch.randperm(2048)[:outliers]] *= 1000
        x = x.bfloat16()
        dense = F.linear(x.float(), weight.dense64.float()).bfloat16()  # with weights that bf16 does not round
        assert_as_good_as_dense(weight(x), dense, weight.reference(x))
        # fp32 x: no rounding of y hides what x lost
        assert_as_good_as_dense(weight(x.float()), dense, weight.reference(x))
        as_float = (weight(x.float()).double() - weight.reference(x)).abs().max() / weight.reference(x).abs().max()
        assert as_float < 3e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("outlier", [1e2, 1e3, 1e4, 1e6])
def test_outliers_cost_their_neighbours_nothing(outlier, bits, dtype, isa, threads):
    """One or many outliers in 128 columns, where W keeps them and where it has pruned them; one token of M or all."""
    torch.manual_seed(0)
    weight = Weight(bits, 192, 1500, kept=(0, 1, 2))  # the last column of each four is pruned, the others mostly kept
    for M, wide_token in ((1, 0), (5, 3), (5, slice(None)), (33, 20)):
        for columns in (3, slice(259, 384, 4), 1499, 0, 640, slice(128, 256, 4), [3, 4, 257, 1100]):
            x = torch.randn(M, 1500)
            plain = weight(x.to(dtype))
            x[wide_token, columns] = outlier
            x = x.to(dtype)
            dense = F.linear(x.float(), weight.dense64.float()).to(dtype)
            out, ref = weight(x), weight.reference(x)
            assert_close(out, x, weight, ulps=16)  # a sum that starts large is rounded coarsely at each of its steps
            for m in range(M):
                got, limit = (out[m].double() - ref[m]).norm(), 2 * (dense[m].double() - ref[m]).norm()
                assert got <= limit, f"{outlier:g} in columns {columns}: error {got:.3g} > {limit:.3g} of token {m}"
                assert torch.equal(weight(x[m]), out[m])
            if M > 1 and isinstance(wide_token, int):
                others = torch.arange(M) != wide_token
                assert torch.equal(out[others], plain[others])
    threads(2)
    assert torch.equal(weight(x), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_outliers_among_zeros_and_infinities(bits, dtype, isa):
    """What is zero is not small; an outlier next to an infinity is still one; the last columns are fewer than 128."""
    torch.manual_seed(0)
    weight = Weight(bits, 64, 390, kept=(0, 1, 2))
    x = torch.randn(6, 390) * (torch.rand(6, 390) < 0.2)
    x[:, 131] = 3e5
    x[0, 387], x[1, 388], x[2, 128:256] = -1e6, 2e4, 0
    x = x.to(dtype)
    assert_close(weight(x), x, weight)
    x[1, 3], x[4, 128] = math.inf, -math.inf
    out, ref = weight(x), weight.reference(x)
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(out), special(ref))
    finite = [0, 2, 3, 5]
    assert_close(out[finite], x[finite], weight)


@pytest.mark.parametrize("bits", FORMATS)
def test_ordinary_bf16_inputs_lose_nothing(bits, isa):
    """Where no x is under a hundredth of the largest, the sums are as good as in fp32."""
    weight = Weight(bits, 64, 512)
    x = (torch.randn(5, 512).sign() * (torch.rand(5, 512) * 4 + 0.05)).bfloat16()
    ref = weight.reference(x)
    limit = ref.abs() * 1.01 * 2.0**-8 + (x.double().abs() @ weight.dense64.abs().T) * 2.0**-22
    assert ((weight(x).double() - ref).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_any_magnitude(bits, dtype, isa):
    """Steps of x are powers of two over almost the whole range of fp32, and each block of columns has its own."""
    weight = Weight(bits, 40, 700)
    edges = torch.tensor([255.0, 254.0, 253.0, 256.0, 128.0, 127.5, -255.0, -256.0])  # where a byte might carry
    for exponent in (-100, -60, 0, 60, 100):
        x = torch.randn(3, 700) * 2.0**exponent
        x[1, :128] = 0
        x[2, 128:256] *= 2.0**10
        x[0, :64] = edges.repeat(8) * 2.0**exponent
        x[0, 128:192] = torch.randn(64) * 2.0 ** (exponent - 8)
        x[0, 128] = -255 * 2.0 ** (exponent - 8)
        assert_close(weight(x.to(dtype)), x.to(dtype), weight)
    assert torch.equal(weight(torch.zeros(2, 700, dtype=dtype)), torch.zeros(2, 40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_many_tokens_are_cut_into_blocks(bits, dtype, isa):
    weight, x = Weight(bits, 40, 136), torch.randn(1100, 136)
    x[[3, 700, 1000], 7] = 1e5
    x = x.to(dtype)
    assert_close(weight(x), x, weight, ulps=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_same_bits_for_any_number_of_tokens_and_threads(bits, dtype, isa, threads):
    torch.manual_seed(1)
    weight, x = Weight(bits, 200, 4500), torch.randn(40, 4500).to(dtype)
    threads(1)
    one = weight(x)
    threads(2)
    assert torch.equal(weight(x), one)
    for M in (1, 4, 6, 7, 13):
        assert torch.equal(weight(x[:M]), one[:M])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_any_layout_of_x(bits, dtype, isa):
    weight = Weight(bits, 24, 64)
    base = torch.randn(6, 5, 2 * 64).to(dtype)
    for x in (base[..., :64], base[..., ::2], base[:, 2, 1:65], base[0, :, :64].T.contiguous().T, base[0, 0, 3:67]):
        out = weight(x)
        assert_close(out, x, weight)
        assert out.is_contiguous()
    assert weight(base[:0, :, :64]).shape == (0, 5, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_infinities_and_nan_spread_as_in_a_dense_product(bits, dtype, isa):
    weight = Weight(bits, 37, 300)
    for M in (5, 20):
        x = torch.randn(M, 300).to(dtype)
        x[1, 299], x[2, 3], x[3, 130], x[3, 131] = -math.inf, math.nan, math.inf, math.inf
        out, ref = weight(x), weight.reference(x)
        assert torch.equal(out.isnan(), ref.isnan()) and torch.equal(out == math.inf, ref == math.inf)
        assert torch.equal(out == -math.inf, ref == -math.inf) and out.isinf().any()
        assert out[0].isfinite().all() and out[4:].isfinite().all() and not out[1:4].isfinite().any()


@pytest.mark.parametrize("bits", FORMATS)
def test_no_columns_or_rows(bits, isa):
    bias = torch.randn(9)
    assert torch.equal(Weight(bits, 9, 0)(torch.randn(4, 0), bias), bias.expand(4, 9))
    assert Weight(bits, 0, 16)(torch.randn(4, 16)).shape == (4, 0)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("N,K", [(1, 1), (3, 5), (8, 8), (33, 63), (130, 172), (64, 352)])
def test_preparing_is_exact(N, K, bits):
    weight = Weight(bits, N, K)
    if bits == 8:
        weight.values[0, 0] = -128  # no quantiser writes it, but a file may hold it
        blocks, masks = cpu.prepare_int8(weight.values, weight.meta)
        back = (*cpu.restore_int8(blocks, masks, N), weight.scales)
    else:
        weight.values[0, 0] |= 8
        prepared = cpu.prepare_int4(weight.values, weight.meta, weight.scales)
        back = cpu.restore_int4(*prepared, N)
    for got, want in zip(back, (weight.values, weight.meta, weight.scales), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want) and got.is_contiguous()


def test_prepared_bytes():
    for bits, share in ((8, 5 / 8), (4, 3 / 8 + 1 / 64)):
        weight = Weight(bits, 64, 256)
        scales = 64 * 4 if bits == 8 else 0
        assert sum(t.nbytes for t in weight.prepared) == 64 * 256 * share + scales


@pytest.mark.parametrize("bits", FORMATS)
def test_mistakes_are_told(bits):
    weight = Weight(bits, 8, 16)
    blocks, masks, scales = weight.prepared
    x = torch.randn(2, 16)
    product = cpu.spmm24_int8 if bits == 8 else cpu.spmm24_int4
    rest = () if bits == 8 else (weight.scales,)
    prepare = cpu.prepare_int8 if bits == 8 else cpu.prepare_int4
    meta = weight.meta.clone()
    meta[3, 1] = 0x55
    with pytest.raises(ValueError, match="2 nibbles of meta are not legal"):
        prepare(weight.values, meta, *rest)
    with pytest.raises(ValueError, match=f"prepare_int{bits} takes"):
        prepare(weight.values, weight.meta[:, :1], *rest)
    with pytest.raises(ValueError, match=f"prepare_int{bits} takes"):
        prepare(weight.values.float(), weight.meta, *rest)
    with pytest.raises(ValueError, match="scales must be"):
        product(x, blocks, masks, scales.half(), 8)
    with pytest.raises(ValueError, match="24 features"):
        product(torch.randn(2, 24), blocks, masks, scales, 8)
    with pytest.raises(ValueError, match="bfloat16 or float32 on the CPU, got torch.float16"):
        product(x.half(), blocks, masks, scales, 8)
    with pytest.raises(ValueError, match="bias must be"):
        product(x, blocks, masks, scales, 8, torch.zeros(7))
    with pytest.raises(ValueError, match="are not what prepare"):
        product(x, blocks[..., :8], masks, scales, 8)
    with pytest.raises(ValueError, match="for N=40"):
        product(x, blocks, masks, torch.zeros(40) if bits == 8 else scales, 40)
    if bits == 4:
        with pytest.raises(ValueError, match=r"scales must be \[8, 1\] bfloat16"):
            cpu.prepare_int4(weight.values, weight.meta, weight.scales.float())
        with pytest.raises(ValueError, match="scales must be"):
            cpu.restore_int4(blocks, masks, scales[:, :0], 8)


GUARDED = """
import ctypes, mmap, sys, torch
from sparsekit_kernels import cpu

def at_the_end_of_a_page(t):
    pages = -(-t.nbytes // 4096) * 4096
    memory = mmap.mmap(-1, pages + 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(4096), 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - t.nbytes).view(t.shape).copy_(t)

for isa in cpu.ISAS[: cpu.ISAS.index(cpu.isa()) + 1]:
    rest = cpu._functions()["spmm24_quantised"], cpu._parallel_for()
    cpu._spmm24 = lambda name, level=cpu.ISAS.index(isa), rest=rest: (level, *rest)
    for dtype in (torch.bfloat16, torch.float32):
        for N, K in ((1, 1), (9, 5), (17, 63), (40, 72), (8, 352)):
            half = -(-K // 8) * 4
            meta = at_the_end_of_a_page(torch.full((N, half // 4), 0x44, dtype=torch.uint8))
            int8 = at_the_end_of_a_page(torch.ones(N, half, dtype=torch.int8))
            int4 = at_the_end_of_a_page(torch.full((N, half // 2), 0x11, dtype=torch.uint8))
            scales = at_the_end_of_a_page(torch.ones(N))
            blocks8 = [at_the_end_of_a_page(t) for t in cpu.prepare_int8(int8, meta)]
            blocks4 = cpu.prepare_int4(int4, meta, torch.ones(N, -(-K // 128), dtype=torch.bfloat16))
            blocks4 = [at_the_end_of_a_page(t) for t in blocks4]
            bias = at_the_end_of_a_page(torch.randn(N).to(dtype))
            for M in (1, 2, 6, 7, 20):
                x = at_the_end_of_a_page(torch.randn(M, K).to(dtype))
                want = (x.float() * (torch.arange(K) % 4 < 2)).sum(1)[:, None] + bias.float()
                for y in (cpu.spmm24_int8(x, *blocks8, scales, N, bias), cpu.spmm24_int4(x, *blocks4, N, bias)):
                    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-1)
print("inside")
"""


def test_reads_nothing_outside_its_tensors():
    path = str(Path(cpu.__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {path!r})\n{GUARDED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "inside" in done.stdout, f"status {done.returncode}: {done.stderr}"
