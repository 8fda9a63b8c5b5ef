"""The PTX emulator itself: small programs whose result is known, and programs that must be refused."""

import numpy as np
import pytest
import torch

from tests.kernels.ptx import PtxError, run

TYPES = {np.dtype(np.uint16): ("b16", "h"), np.dtype(np.uint32): ("b32", "r"), np.dtype(np.uint64): ("b64", "d")}


def tensor(array):
    """The same bits as a signed tensor, which every torch has."""
    return torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}").copy())


def kernel(body, pointers=2, threads=32, registers=""):
    """An entry with %tid.x in %i, the thread's 4-byte offset in %o and the pointers in %p0, %p1, …"""
    params = ", ".join(f".param .u64 .ptr .global .align 1 p{n}" for n in range(pointers))
    loads = "\n".join(f"ld.param.b64 %p{n}, [p{n}];" for n in range(pointers))
    return f"""
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry test({params})
.reqntid {threads}
{{
  .reg .pred %c<8>;  .reg .b16 %h<32>;  .reg .b32 %r<64>;  .reg .b64 %d<64>;
  .reg .b32 %i;  .reg .b32 %o;  .reg .b64 %p<8>;  .reg .b32 %s;  {registers}
  mov.u32 %i, %tid.x;
  shl.b32 %o, %i, 2;
  {loads}
  {body}
  ret;
}}"""


def apply(instructions, out, *inputs):
    """Run instructions on one thread per element: inputs in %x0, %x1, …, the result in %y."""
    n = len(inputs[0])
    reads, names = [], []
    for k, a in enumerate(inputs):
        bits, _ = TYPES[a.dtype]
        names.append(f".reg .{bits} %x{k};")
        reads.append(f"mad.wide.u32 %d0, %i, {a.itemsize}, %p{k}; ld.global.{bits} %x{k}, [%d0];")
    bits, _ = TYPES[np.dtype(out)]
    write = f"mad.wide.u32 %d0, %i, {np.dtype(out).itemsize}, %p{len(inputs)}; st.global.{bits} [%d0], %y;"
    body = "\n".join([*reads, instructions, write])
    ptx = kernel(body, len(inputs) + 1, n, " ".join([*names, f".reg .{bits} %y;"]))
    result = tensor(np.full(n, 0x5A, out))
    run(ptx, (1,), [*(tensor(a) for a in inputs), result])
    return result.numpy().view(out)


def integers(rng, dtype, n=256):
    """Random bits, and the values at which integers go wrong."""
    bits = np.dtype(dtype).itemsize * 8
    edges = [0, 1, 2, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 2 ** (bits // 2), 31, 32, 33]
    values = rng.integers(0, 2**bits, n, dtype=dtype)
    values[: len(edges)] = np.array([e % 2**bits for e in edges], dtype)
    return rng.permutation(values)


def signed(x, bits):
    x %= 1 << bits
    return x - (1 << bits) if x >> (bits - 1) else x


def truncated(a, b):
    """Division as C does it."""
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


S = {16: lambda x: signed(x, 16), 32: lambda x: signed(x, 32), 64: lambda x: signed(x, 64)}
BINARY = {
    "add.s{n}": lambda a, b, n: a + b,
    "sub.s{n}": lambda a, b, n: a - b,
    "mul.lo.s{n}": lambda a, b, n: a * b,
    "mul.hi.u{n}": lambda a, b, n: a * b >> n,
    "mul.hi.s{n}": lambda a, b, n: S[n](a) * S[n](b) >> n,
    "and.b{n}": lambda a, b, n: a & b,
    "or.b{n}": lambda a, b, n: a | b,
    "xor.b{n}": lambda a, b, n: a ^ b,
    "min.s{n}": lambda a, b, n: min(S[n](a), S[n](b)),
    "max.u{n}": lambda a, b, n: max(a, b),
    "div.u{n}": lambda a, b, n: a // b if b else 2**n - 1,
    "rem.u{n}": lambda a, b, n: a % b if b else a,
    "div.s{n}": lambda a, b, n: truncated(S[n](a), S[n](b)) if b else -1,
    "rem.s{n}": lambda a, b, n: S[n](a) - truncated(S[n](a), S[n](b)) * S[n](b) if b else a,
}


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("opcode", BINARY)
def test_integer_arithmetic(opcode, bits):
    rng = np.random.default_rng(bits)
    dtype = np.dtype(f"u{bits // 8}").type
    a, b = integers(rng, dtype), integers(rng, dtype)
    result = apply(f"{opcode.format(n=bits)} %y, %x0, %x1;", dtype, a, b)
    expected = [BINARY[opcode](int(x), int(y), bits) % 2**bits for x, y in zip(a, b, strict=True)]
    assert result.tolist() == expected


@pytest.mark.parametrize("bits", [16, 32])
def test_wide_products(bits):
    rng = np.random.default_rng(1)
    narrow, wide = np.dtype(f"u{bits // 8}").type, np.dtype(f"u{bits // 4}").type
    a, b, c = integers(rng, narrow), integers(rng, narrow), integers(rng, wide)
    result = apply(f"mul.wide.u{bits} %y, %x0, %x1;", wide, a, b)
    assert result.tolist() == [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    result = apply(f"mad.wide.s{bits} %y, %x0, -3, %x2;", wide, a, b, c)
    assert result.tolist() == [(S[bits](int(x)) * -3 + int(z)) % 2 ** (2 * bits) for x, z in zip(a, c, strict=True)]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    rng = np.random.default_rng(2)
    dtype = np.dtype(f"u{bits // 8}").type
    a, n = integers(rng, dtype), rng.integers(0, 80, 256, dtype=np.uint32)
    pairs = [(int(x), int(s)) for x, s in zip(a, n, strict=True)]
    assert apply(f"shl.b{bits} %y, %x0, %x1;", dtype, a, n).tolist() == [(x << s) % 2**bits for x, s in pairs]
    assert apply(f"shr.u{bits} %y, %x0, %x1;", dtype, a, n).tolist() == [x >> s for x, s in pairs]
    result = apply(f"shr.s{bits} %y, %x0, %x1;", dtype, a, n).tolist()
    assert result == [(S[bits](x) >> s) % 2**bits for x, s in pairs]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("start,length", [(0, 1), (3, 4), (0, 32), (28, 8), (31, 1), (5, 0)])
def test_extract(kind, start, length):
    bits = int(kind[1:])
    dtype = np.dtype(f"u{bits // 8}").type
    a = integers(np.random.default_rng(3), dtype)

    def field(x):
        keep = min(length, bits - start)
        x = x >> start & ((1 << keep) - 1)
        return signed(x, keep) if kind[0] == "s" and keep else x

    result = apply(f"bfe.{kind} %y, %x0, {start}, {length};", dtype, a).tolist()
    assert result == [field(int(x)) % 2**bits for x in a]


@pytest.mark.parametrize("start,length", [(0, 1), (3, 4), (0, 32), (28, 8), (5, 0), (40, 3)])
def test_insert(start, length):
    rng = np.random.default_rng(4)
    a, b = integers(rng, np.uint32), integers(rng, np.uint32)
    mask = ((1 << length) - 1) << start & 0xFFFFFFFF
    result = apply(f"bfi.b32 %y, %x0, %x1, {start}, {length};", np.uint32, a, b).tolist()
    assert result == [(int(y) & ~mask) | (int(x) << start & mask) for x, y in zip(a, b, strict=True)]


def test_permute_and_logic():
    rng = np.random.default_rng(5)
    a, b, c = (integers(rng, np.uint32) for _ in range(3))

    def permuted(x, y, selector):
        pool = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        out = 0
        for k in range(4):
            nibble = selector >> 4 * k & 15
            byte = pool[nibble & 7]
            out |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * k
        return out

    triples = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert apply("prmt.b32 %y, %x0, %x1, %x2;", np.uint32, a, b, c).tolist() == [permuted(*t) for t in triples]
    assert apply("prmt.b32 %y, %x0, %x1, 0x5140U;", np.uint32, a, b).tolist() == [
        permuted(x, y, 0x5140) for x, y, _ in triples
    ]
    for table in (0xEA, 0x96, 0xF8, 0x6A, 0x01):
        expected = [
            sum((table >> ((x >> k & 1) * 4 + (y >> k & 1) * 2 + (z >> k & 1)) & 1) << k for k in range(32))
            for x, y, z in triples
        ]
        result = apply(f"lop3.b32 %y, %x0, %x1, %x2, {table};", np.uint32, a, b, c)
        assert result.tolist() == expected, hex(table)


def test_funnel_shift_and_counts():
    rng = np.random.default_rng(6)
    a, b, c = (integers(rng, np.uint32) for _ in range(3))
    triples = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
    result = apply("shf.r.wrap.b32 %y, %x0, %x1, %x2;", np.uint32, a, b, c).tolist()
    assert result == [((y << 32 | x) >> (z & 31)) % 2**32 for x, y, z in triples]
    result = apply("shf.l.clamp.b32 %y, %x0, %x1, %x2;", np.uint32, a, b, c).tolist()
    assert result == [((y << 32 | x) << min(z, 32) >> 32) % 2**32 for x, y, z in triples]
    assert apply("popc.b32 %y, %x0;", np.uint32, a).tolist() == [x.bit_count() for x, _, _ in triples]
    assert apply("clz.b32 %y, %x0;", np.uint32, a).tolist() == [32 - x.bit_length() for x, _, _ in triples]
    assert apply("brev.b32 %y, %x0;", np.uint32, a).tolist() == [int(f"{x:032b}"[::-1], 2) for x, _, _ in triples]


def floats(rng, n=256):
    """Values of all sizes with both zeros, infinities, NaN and ties for 16 bits."""
    x = (rng.standard_normal(n) * 10.0 ** rng.integers(-8, 6, n)).astype(np.float32)
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.00390625, 1.01171875, 65519.0, 65520.0, 2049.0, 448.0, 464.1, 6e-8]
    x[: len(edges)] = edges
    return x


def same(result, expected):
    assert torch.equal(torch.nan_to_num(result.float(), 7777.0), torch.nan_to_num(expected.float(), 7777.0))
    assert torch.equal(torch.signbit(result)[~result.isnan()], torch.signbit(expected)[~expected.isnan()])


@pytest.mark.parametrize("kind,dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_sixteen_bits(kind, dtype):
    rng = np.random.default_rng(7)
    x, y = floats(rng), rng.permutation(floats(rng))
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    bits = x.view(np.uint32), y.view(np.uint32)
    narrow = apply(f"cvt.rn.{kind}.f32 %y, %x0;", np.uint16, bits[0])
    same(tensor(narrow).view(dtype), tx.to(dtype))
    same(tensor(apply(f"cvt.f32.{kind} %y, %x0;", np.uint32, narrow)).view(torch.float32), tx.to(dtype).float())
    pairs = apply(f"cvt.rn.{kind}x2.f32 %y, %x0, %x1;", np.uint32, *bits)  # the first goes to the high half
    pairs = tensor(pairs).view(dtype).view(-1, 2)
    same(pairs[:, 1], tx.to(dtype))
    same(pairs[:, 0], ty.to(dtype))
    a, b = (v.to(dtype).view(torch.int16).numpy().view(np.uint16) for v in (tx, ty))
    for name, f in {"add": torch.add, "mul": torch.mul, "sub": torch.sub}.items():
        exact = f(tx.to(dtype).double(), ty.to(dtype).double())
        result = tensor(apply(f"{name}.rn.{kind} %y, %x0, %x1;", np.uint16, a, b)).view(dtype)
        same(result, exact.to(dtype) if kind == "f16" else f(tx.to(dtype), ty.to(dtype)))


@pytest.mark.parametrize("of", [2, 3])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_extremes_of_two_and_of_three(nan, of):
    values = np.float32([[1, 2, np.nan, -np.inf], [2, -1, 0, np.nan], [0, 3, -1, 5]])[:of]
    names = ", ".join(f"%x{n}" for n in range(of))
    for name, f in (("min", np.minimum if nan else np.fmin), ("max", np.maximum if nan else np.fmax)):
        inputs = [np.tile(value, 8).view(np.uint32) for value in values]
        kept = [x.copy() for x in inputs]
        result = apply(f"{name}{nan}.f32 %y, {names};", np.uint32, *inputs).view(np.float32)
        np.testing.assert_array_equal(result, np.tile(f.reduce(values), 8))
        np.testing.assert_array_equal(inputs, kept)


def test_fused_multiply_add_rounds_once():
    a = np.float32(1 + 2**-12)
    values = [np.full(32, v, np.float32).view(np.uint32) for v in (a, a, -1 - 2**-11)]
    result = apply("fma.rn.f32 %y, %x0, %x1, %x2;", np.uint32, *values).view(np.float32)
    assert (result == np.float32(2**-24)).all()
    halves = [np.full(32, v, np.float16).view(np.uint16) for v in (1 + 2**-6, 1 + 2**-6, -1 - 2**-5)]
    assert (apply("fma.rn.f16 %y, %x0, %x1, %x2;", np.uint16, *halves).view(np.float16) == np.float16(2**-12)).all()


@pytest.mark.parametrize("kind,dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats(kind, dtype):
    every = torch.arange(256, dtype=torch.uint8)
    pairs = torch.stack([every, every.flip(0)], dim=1).contiguous()
    bits = pairs.view(torch.int16).view(-1).numpy().view(np.uint16)
    result = tensor(apply(f"cvt.rn.f16x2.{kind}x2 %y, %x0;", np.uint32, bits)).view(torch.float16).view(-1, 2)
    same(result, pairs.view(dtype).to(torch.float16))
    x = torch.from_numpy(floats(np.random.default_rng(8)))
    largest = torch.finfo(dtype).max
    values = x.numpy().view(np.uint32)
    result = tensor(apply(f"cvt.rn.satfinite.{kind}x2.f32 %y, %x0, %x0;", np.uint16, values)).view(torch.uint8)
    expected = x.clamp(-largest, largest).to(dtype).view(torch.uint8)
    assert torch.equal(result.view(-1, 2), torch.stack([expected, expected], dim=1))


def test_conversions():
    rng = np.random.default_rng(9)
    x = floats(rng)
    a = integers(rng, np.uint32)
    whole = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
    result = apply("cvt.rni.s32.f32 %y, %x0;", np.uint32, x.view(np.uint32)).view(np.int32)
    assert result.tolist() == np.clip(np.rint(whole), -(2**31), 2**31 - 1).astype(np.int64).tolist()
    result = apply("cvt.rzi.u32.f32 %y, %x0;", np.uint32, x.view(np.uint32))
    assert result.tolist() == np.clip(np.trunc(whole), 0, 2**32 - 1).astype(np.int64).tolist()
    result = apply("cvt.rn.f32.s32 %y, %x0;", np.uint32, a).view(np.float32)
    assert (result == a.view(np.int32).astype(np.float32)).all()
    assert apply("cvt.s64.s32 %y, %x0;", np.uint64, a).tolist() == [signed(int(v), 32) % 2**64 for v in a]
    assert apply("cvt.u64.u32 %y, %x0;", np.uint64, a).tolist() == a.tolist()
    assert apply("cvt.u16.u32 %y, %x0;", np.uint16, a).tolist() == (a & 0xFFFF).tolist()
    assert apply("cvt.s32.s8 %y, %x0;", np.uint32, a).tolist() == [signed(int(v) & 255, 8) % 2**32 for v in a]
    assert apply("cvt.u32.u8 %y, %x0;", np.uint32, a).tolist() == (a & 255).tolist()


def test_packing_and_selection():
    rng = np.random.default_rng(10)
    a, b = integers(rng, np.uint32), integers(rng, np.uint32)
    packed = apply("mov.b64 %y, {%x0, %x1};", np.uint64, a, b)
    assert (packed == (b.astype(np.uint64) << np.uint64(32) | a)).all()
    swapped = apply("mov.b32 {%h0, %h1}, %x0; mov.b32 %y, {%h1, %h0};", np.uint32, a)
    assert (swapped == (a << 16 | a >> 16)).all()
    unwritten = apply("mov.b64 %y, {%x0, %r9};", np.uint64, a)
    assert (unwritten == (a | np.uint64(0xFFFFFFFF << 32))).all()
    result = apply("setp.lt.s32 %c0|%c1, %x0, %x1; selp.b32 %y, %x0, %x1, %c1;", np.uint32, a, b)
    assert (result == np.where(a.view(np.int32) < b.view(np.int32), b, a)).all()
    x = floats(rng).view(np.uint32)
    y = rng.permutation(x)
    fx, fy = x.view(np.float32), y.view(np.float32)
    for name, expected in {
        "lt": fx < fy, "neu": ~(fx == fy), "ne": (fx != fy) & ~np.isnan(fx) & ~np.isnan(fy),
        "geu": ~(fx < fy), "nan": np.isnan(fx) | np.isnan(fy),
    }.items():  # fmt: skip
        result = apply(f"setp.{name}.f32 %c0, %x0, %x1; selp.b32 %y, 1, 0, %c0;", np.uint32, x, y)
        assert (result == expected).all(), name


def test_packed_halves():
    rng = np.random.default_rng(11)
    x, y, z = (rng.standard_normal((128, 2)).astype(np.float16) for _ in range(3))
    bits = [v.view(np.uint32).reshape(-1) for v in (x, y, z)]
    result = apply("fma.rn.f16x2 %y, %x0, %x1, %x2;", np.uint32, *bits).view(np.float16).reshape(-1, 2)
    assert (result == (x.astype(np.float64) * y + z).astype(np.float16)).all()
    result = apply("sub.rn.f16x2 %y, %x0, 0x64006400U;", np.uint32, bits[0]).view(np.float16).reshape(-1, 2)
    assert (result == x - np.float16(1024)).all()


# Control


def test_loops_of_different_length_and_nested_branches():
    """Collatz: every thread loops until it is done, both ways through an inner branch."""
    body = """
  add.s32 %r0, %i, 1;
  mov.b32 %r1, 0;
LOOP:
  setp.eq.s32 %c0, %r0, 1;
  @%c0 bra DONE;
  and.b32 %r2, %r0, 1;
  setp.eq.s32 %c1, %r2, 0;
  @%c1 bra EVEN;
  mad.lo.s32 %r0, %r0, 3, 1;
  bra.uni NEXT;
EVEN:
  shr.u32 %r0, %r0, 1;
NEXT:
  add.s32 %r1, %r1, 1;
  bra LOOP;
DONE:
  shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
  mad.wide.u32 %d0, %i, 4, %p0;
  st.global.b32 [%d0], %r1;
  mad.wide.u32 %d0, %i, 4, %p1;
  st.global.b32 [%d0], %r3;"""

    def collatz(n):
        steps = 0
        while n != 1:
            n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
        return steps

    mine, neighbour = torch.zeros(96, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    run(kernel(body, threads=96), (1,), [mine, neighbour])
    expected = [collatz(n + 1) for n in range(96)]
    assert mine.tolist() == expected
    assert neighbour.tolist() == [expected[n ^ 1] for n in range(96)]  # all met again before the shuffle


def test_early_return_and_guards():
    body = """
  setp.ge.s32 %c0, %i, 40;
  @%c0 ret;
  setp.lt.s32 %c1, %i, 8;
  mov.b32 %r0, 1;
  @%c1 mov.b32 %r0, 2;
  @!%c1 add.s32 %r0, %r0, 10;
  mad.wide.u32 %d0, %i, 4, %p0;
  st.global.b32 [%d0], %r0;"""
    out = torch.full((64,), -1, dtype=torch.int32)
    run(kernel(body, 1, 64), (1,), [out])
    assert out.tolist() == [2] * 8 + [11] * 32 + [-1] * 24


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("threads_at_once", [1, 64, 1 << 14])
def test_the_last_cta_sees_the_work_of_all(order, threads_at_once):
    """Each CTA writes its index, then counts itself; the one that counts last adds everything up."""
    body = """
  mov.u32 %r0, %ctaid.x;  mov.u32 %r1, %ctaid.y;  mov.u32 %r2, %nctaid.x;
  mad.lo.s32 %r3, %r1, %r2, %r0;
  setp.eq.s32 %c0, %i, 0;
  mad.wide.u32 %d0, %r3, 4, %p0;
  @%c0 st.global.b32 [%d0], %r3;
  membar.gl;
  @!%c0 bra END;
  atom.global.gpu.acq_rel.add.u32 %r4, [%p1], 1;
  setp.ne.s32 %c1, %r4, 14;
  @%c1 bra END;
  mov.b32 %r5, 0;  mov.b32 %r6, 0;  mov.b64 %d1, %p0;
SUM:
  ld.global.b32 %r7, [%d1];
  add.s32 %r5, %r5, %r7;
  add.s64 %d1, %d1, 4;
  add.s32 %r6, %r6, 1;
  setp.lt.s32 %c2, %r6, 15;
  @%c2 bra SUM;
  st.global.b32 [%p1+4], %r5;
END:"""
    parts, counter = torch.full((15,), -1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    run(kernel(body), (5, 3), [parts, counter], order=order, threads_at_once=threads_at_once)
    assert parts.tolist() == list(range(15))
    assert counter.tolist() == [15, sum(range(15))]


def test_atomics_on_one_address():
    body = """
  and.b32 %r0, %i, 3;
  mad.wide.u32 %d0, %r0, 4, %p0;
  atom.global.add.u32 %r1, [%d0], %i;
  cvt.rn.f32.u32 %r2, %i;
  red.global.add.f32 [%p0+16], %r2;
  atom.global.cas.b32 %r3, [%p0+20], 0, %i;
  mad.wide.u32 %d1, %i, 4, %p1;
  st.global.b32 [%d1], %r1;"""
    out, old = torch.zeros(6, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(kernel(body, threads=64), (1,), [out, old])
    assert out[:4].tolist() == [sum(range(k, 64, 4)) for k in range(4)]
    assert out[4:5].view(torch.float32).item() == sum(range(64))
    assert out[5].item() == 1  # thread 0 changed 0 to 0, thread 1 to 1
    assert old.tolist() == [sum(range(i % 4, i, 4)) for i in range(64)]


@pytest.mark.parametrize("mode,amount,limit", [("bfly", 5, 31), ("up", 3, 0), ("down", 9, 31), ("idx", 7, 31)])
def test_shuffles(mode, amount, limit):
    body = f"""
  shfl.sync.{mode}.b32 %r0|%c0, %i, {amount}, {limit}, -1;
  @!%c0 add.s32 %r0, %r0, 1000;
  mad.wide.u32 %d0, %i, 4, %p0;
  st.global.b32 [%d0], %r0;"""
    out = torch.zeros(64, dtype=torch.int32)
    run(kernel(body, 1, 64), (1,), [out])

    def source(lane):
        other = {"bfly": lane ^ amount, "up": lane - amount, "down": lane + amount, "idx": amount}[mode]
        return other if 0 <= other < 32 else lane + 1000

    assert out.tolist() == [source(i % 32) + i // 32 * 32 for i in range(64)]


def test_scopes_of_inline_assembly():
    body = """
  { .reg .b32 t; add.s32 t, %i, 1; mov.b32 %r0, t; }
  { .reg .b32 t; add.s32 t, %r0, 10; mov.b32 %r1, t; }
  mad.wide.u32 %d0, %i, 4, %p0;
  st.global.b32 [%d0], %r1;"""
    out = torch.zeros(32, dtype=torch.int32)
    run(kernel(body, 1), (1,), [out])
    assert out.tolist() == list(range(11, 43))


# Shared memory and asynchronous copies

EXCHANGE = """
  mov.b32 %s, smem;
  add.s32 %r0, %s, %o;
  st.shared.b32 [%r0], %i;
  {barrier}
  xor.b32 %r1, %o, {flip};
  add.s32 %r1, %s, %r1;
  ld.shared.b32 %r2, [%r1];
  mad.wide.u32 %d0, %i, 4, %p0;
  st.global.b32 [%d0], %r2;"""


def test_exchange_through_shared_memory():
    out = torch.zeros(64, dtype=torch.int32)
    run(kernel(EXCHANGE.format(barrier="bar.sync 0;", flip=128), 1, 64), (1,), [out], 256)
    assert out.tolist() == [i ^ 32 for i in range(64)]
    run(kernel(EXCHANGE.format(barrier="", flip=4), 1, 64), (1,), [out], 256)  # within a warp
    assert out.tolist() == [i ^ 1 for i in range(64)]


def test_matrices_of_eight_by_eight():
    """Lane l gets elements 2 (l % 4) and the next of row l / 4, with .trans of column l / 4; stmatrix undoes it."""
    body = """
  mov.b32 %s, smem;
  shl.b32 %r0, %i, 4;
  add.s32 %r1, %s, %r0;
  mad.wide.u32 %d0, %i, 16, %p0;
  cp.async.cg.shared.global [ %r1 + 0 ], [ %d0 + 0 ], 0x10, 16;
  cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];
  mad.wide.u32 %d1, %i, 16, %p1;
  st.global.v4.b32 [%d1], {{%r2, %r3, %r4, %r5}};
  stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1+512], {{%r2, %r3, %r4, %r5}};
  ld.shared.v4.b32 {{%r6, %r7, %r8, %r9}}, [%r1+512];
  mad.wide.u32 %d2, %i, 16, %p2;
  st.global.v4.b32 [%d2], {{%r6, %r7, %r8, %r9}};"""
    x = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    for trans in ("", ".trans"):
        fragments, back = torch.zeros(32, 4, 2, dtype=torch.int16), torch.zeros(4, 8, 8, dtype=torch.int16)
        run(kernel(body.format(trans=trans), 3), (1,), [x, fragments, back], 1024)
        for lane in range(32):
            for k in range(4):
                m = x[k].T if trans else x[k]
                assert fragments[lane, k].tolist() == m[lane // 4, 2 * (lane % 4) :][:2].tolist()
        assert torch.equal(back, x)


def test_asynchronous_copy_fills_with_zeros():
    body = """
  mov.b32 %s, smem;
  add.s32 %r0, %s, %o;
  mad.wide.u32 %d0, %i, 4, %p0;
  setp.lt.s32 %c0, %i, 20;
  selp.b32 %r1, 4, 0, %c0;
  cp.async.ca.shared.global [%r0], [%d0], 4, %r1;
  cp.async.commit_group;
  cp.async.commit_group;
  cp.async.wait_group 1;
  ld.shared.b32 %r2, [%r0];
  mad.wide.u32 %d1, %i, 4, %p1;
  st.global.b32 [%d1], %r2;"""
    x, out = torch.arange(1, 21, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    run(kernel(body), (1,), [x, out], 128)
    assert out.tolist() == [*range(1, 21), *[0] * 12]


# What must be refused

STORE = "mad.wide.u32 %d0, %i, 4, %p0; st.global.b32 [%d0], %i;"
REFUSED = {
    "out of bounds.*thread 31 of CTA": ("add.s64 %p0, %p0, 4;" + STORE, 32),
    "out of bounds.*thread 0 of CTA": ("add.s64 %p0, %p0, -4;" + STORE, 32),
    "misaligned.*st.global.b32": ("add.s64 %p0, %p0, 2;" + STORE, 32),
    "out of bounds.*v4": ("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%p0+128];", 32),
    "two threads store different values": ("st.global.b32 [%p0], %i;", 32),
    "nobody wrote": ("mov.b32 %s, smem; ld.shared.b32 %r0, [%s];", 32),
    "256 of 256 in shared memory": ("mov.b32 %s, smem; st.shared.b32 [%s+256], %o;", 32),
    "what warp 1 wrote, no barrier": (EXCHANGE.format(barrier="", flip=128), 64),
    "overwrites what another warp reads": (
        "mov.b32 %s, smem; setp.lt.s32 %c0, %i, 32; @%c0 st.shared.b32 [%s], 5; bar.sync 0;"
        "@%c0 ld.shared.b32 %r0, [%s]; @!%c0 st.shared.b32 [%s], 6;",
        64,
    ),
    "overwrites another warp's store": (
        "mov.b32 %s, smem; setp.lt.s32 %c0, %i, 32; @%c0 st.shared.b32 [%s], 5; @!%c0 st.shared.b32 [%s], 6;",
        64,
    ),
    "before cp.async.wait_group": (
        "mov.b32 %s, smem; add.s32 %r0, %s, %o; mad.wide.u32 %d0, %i, 4, %p0;"
        "cp.async.ca.shared.global [%r0], [%d0], 4; cp.async.commit_group; cp.async.wait_group 1;"
        "ld.shared.b32 %r1, [%r0];",
        32,
    ),
    "not all threads of a CTA reach the barrier": ("setp.lt.s32 %c0, %i, 32; @%c0 bra L; bar.sync 0; L:", 64),
    "does not take part": ("setp.lt.s32 %c0, %i, 16; @%c0 shfl.sync.bfly.b32 %r0, %i, 16, 31, -1;", 32),
    "some threads of a warp": ("setp.lt.s32 %c0, %i, 16; @%c0 bar.warp.sync -1;", 32),
    "unknown instruction.*tcgen05": ("tcgen05.wait::ld.sync.aligned;", 32),
    "unsupported form.*add.rz.f32": ("add.rz.f32 %r0, %r1, %r2;", 32),
    "read before it is written": ("mov.b32 %r0, %r1;", 32),
    "%r1 not written before": ("add.s32 %r0, %r1, 1;", 32),
    "seems to hang": ("L: add.s32 %i, %i, 0; bra L;", 32),
    "trapped": ("trap;", 32),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, monkeypatch):
    monkeypatch.setattr("tests.kernels.ptx.machine.STEPS", 10_000)
    body, threads = REFUSED[message]
    with pytest.raises(PtxError, match=message):
        run(kernel(body, 1, threads), (1,), [torch.zeros(32, dtype=torch.int32)], 256)


def test_a_view_ends_where_it_ends():
    whole = torch.zeros(64, dtype=torch.int32)
    run(kernel(STORE, 1), (1,), [whole[:32]])
    assert whole.tolist() == [*range(32), *[0] * 32]
    run(kernel(STORE, 2), (1,), [whole[8:40], whole[39:41]])  # two views of one tensor that overlap
    with pytest.raises(PtxError, match="out of bounds"):
        run(kernel(STORE, 1), (1,), [whole[33:]])


# Tensor cores, against the formulas of the PTX ISA element by element


def lanes():
    return [(lane, lane >> 2, lane & 3) for lane in range(32)]


def place_a(kind_bits, i, g, t):
    """(row, column) of element a_i of a dense fragment, or of the kept elements of a sparse one."""
    per = 32 // kind_bits
    row = g if i // per % 2 == 0 else g + 8
    return row, t * per + i % per + (4 * per if i >= 2 * per else 0)


def place_b(kind_bits, i, g, t):
    per = 32 // kind_bits
    return t * per + i % per + 4 * per * (i // per), g


MMA_BODY = """
  mad.wide.u32 %d0, %i, {a_bytes}, %p0;  ld.global.v{a_n}.b32 {a}, [%d0];
  mad.wide.u32 %d1, %i, {b_bytes}, %p1;  ld.global.v{b_n}.b32 {b}, [%d1];
  mad.wide.u32 %d2, %i, 16, %p2;  ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d2];
  mad.wide.u32 %d3, %i, 4, %p3;  ld.global.b32 %r30, [%d3];
  {opcode} {{%r24, %r25, %r26, %r27}}, {a}, {b}, {{%r20, %r21, %r22, %r23}}{metadata};
  mad.wide.u32 %d4, %i, 16, %p4;  st.global.v4.b32 [%d4], {{%r24, %r25, %r26, %r27}};"""

MMAS = {
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (torch.float16, 16),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 16),
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": (torch.int8, 32),
    "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32": (torch.float8_e4m3fn, 32),
    "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32": (torch.float16, 32),
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 32),
    "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32": (torch.int8, 64),
    "mma.sp.sync.aligned.m16n8k64.row.col.f32.e4m3.e4m3.f32": (torch.float8_e4m3fn, 64),
}


def place_metadata(bits, row, group, selector):
    """(lane, first bit) of the nibble of a group."""
    if bits == 16:
        return row % 8 * 4 + 2 * selector + group // 4, 16 * (row // 8) + 4 * (group % 4)
    return row % 8 * 4 + 2 * (group // 8) + row // 8, 4 * (group % 8)


def fragment(matrix, registers, place):
    """matrix as the registers of a warp, int32 [32, registers]."""
    bits = matrix.element_size() * 8
    out = torch.zeros(32, registers * 32 // bits, dtype=matrix.dtype)
    for lane, g, t in lanes():
        for i in range(out.shape[1]):
            out[lane, i] = matrix[place(bits, i, g, t)]
    return out.view(torch.int32)


def values(shape, dtype):
    return torch.randint(-100, 100, shape, dtype=torch.int8) if dtype == torch.int8 else torch.randn(shape).to(dtype)


def mma_operands(opcode, seed, selector=0):
    """Random operands: the exact product, and what the kernel gets."""
    torch.manual_seed(seed)
    dtype, k = MMAS[opcode]
    sparse = "mma.sp" in opcode
    kept = k // 2 if sparse else k
    bits = dtype.itemsize * 8
    a, b = values((16, kept), dtype), values((k, 8), dtype)
    c = torch.randint(-1000, 1000, (16, 8), dtype=torch.int32) if dtype == torch.int8 else torch.randn(16, 8)
    dense = a.double()
    metadata = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int64)
    if sparse:
        dense = torch.zeros(16, k, dtype=torch.float64)
        for row in range(16):
            for group in range(k // 4):
                pair = sorted(np.random.default_rng(seed + row * 100 + group).permutation(4)[:2].tolist())
                for slot in range(2):
                    dense[row, 4 * group + pair[slot]] = a[row, 2 * group + slot].double()
                lane, shift = place_metadata(bits, row, group, selector)
                nibble = pair[0] | pair[1] << 2
                metadata[lane] = metadata[lane] & ~(15 << shift) | nibble << shift
    a_n, b_n = 16 * kept * bits // 1024, 8 * k * bits // 1024
    args = [fragment(a, a_n, place_a), fragment(b, b_n, place_b)]
    args.append(torch.stack([c[[g, g, g + 8, g + 8], [2 * t, 2 * t + 1] * 2] for _, g, t in lanes()]))
    args.append(metadata.to(torch.uint32).view(torch.int32))
    return dense @ b.double() + c.double(), args, a_n, b_n


def run_mma(opcode, args, a_n, b_n, selector=0):
    name = [f"%r{n}" for n in range(8)]
    ptx = kernel(
        MMA_BODY.format(
            opcode=opcode, a_n=a_n, b_n=b_n, a_bytes=4 * a_n, b_bytes=4 * b_n,
            a="{" + ", ".join(name[:a_n]) + "}", b="{" + ", ".join(f"%r{n}" for n in range(10, 10 + b_n)) + "}",
            metadata=f", %r30, {selector:#x}" if "mma.sp" in opcode else "",
        ),
        5,
    )  # fmt: skip
    out = torch.full_like(args[2], 77)
    run(ptx, (1,), [*args, out])
    d = torch.zeros(16, 8, dtype=torch.float64)
    for lane, g, t in lanes():
        for i in range(4):
            d[g + 8 * (i >= 2), 2 * t + i % 2] = out[lane, i].double()
    return d


@pytest.mark.parametrize("opcode", MMAS)
@pytest.mark.parametrize("seed", range(3))
def test_mma(opcode, seed):
    for selector in (0, 1) if "mma.sp" in opcode and "k32" in opcode else (0,):
        expected, args, a_n, b_n = mma_operands(opcode, seed, selector)
        result = run_mma(opcode, args, a_n, b_n, selector)
        torch.testing.assert_close(result, expected, rtol=0, atol=0 if ".s8" in opcode else 3e-4)


@pytest.mark.parametrize("opcode", [name for name in MMAS if "mma.sp" in name])
def test_mma_sp_refuses_a_wrong_selector_and_equal_places(opcode):
    expected, args, a_n, b_n = mma_operands(opcode, 0)
    with pytest.raises(PtxError, match="selector"):
        run_mma(opcode, args, a_n, b_n, 2)
    args[3][0] &= ~15  # row 0, group 0: both slots at place 0
    with pytest.raises(PtxError, match=r"metadata \[0, 0\] of row 0, group 0"):
        run_mma(opcode, args, a_n, b_n)


def test_what_is_not_kept_meets_no_nan():
    """A sparse tensor core does not read the rows of B that a row of A skips."""
    opcode = "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32"
    expected, args, a_n, b_n = mma_operands(opcode, 0)
    places = torch.full((32,), 0x44444444, dtype=torch.int32)  # 0 and 1 everywhere
    b = torch.ones(32, 8, dtype=torch.float16)
    b[2::4], b[3::4] = torch.nan, torch.inf
    args = [args[0], fragment(b, b_n, place_b), args[2], places]
    assert run_mma(opcode, args, a_n, b_n).isfinite().all()
    args[3] = torch.full((32,), -0x11111112, dtype=torch.int32)  # 0xEEEEEEEE: places 2 and 3
    assert not run_mma(opcode, args, a_n, b_n).isfinite().any()
