"""What each PTX instruction does, as a function from an instruction to a step of the machine."""

from collections.abc import Callable
from functools import reduce

import numpy as np

from tests.kernels.ptx import tensor_cores
from tests.kernels.ptx.formats import FLOATS, FP8, Float, bf16_from_f32, fp8_from_f32
from tests.kernels.ptx.machine import DTYPES, Array, AsyncCopy, Code, Machine, Step
from tests.kernels.ptx.memory import PENDING, SHARED_BASE, WORDS
from tests.kernels.ptx.program import WIDTHS, Address, Instruction, PtxError, Register, Sink, Symbol, Vector

Builder = Callable[[Code, Instruction], Step]
BUILDERS: dict[str, Builder] = {}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}


def op(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def build(code: Code, i: Instruction) -> Step:
    """Return the step that carries out an instruction; PtxError if there is none."""
    builder = BUILDERS.get(i.parts[0])
    if builder is None:
        raise PtxError(f"unknown instruction: {i.text}")
    return builder(code, i)


def unsupported(i: Instruction) -> PtxError:
    return PtxError(f"unsupported form: {i.text}")


def is_signed(kind: str) -> bool:
    return kind[0] == "s"


def resized(value: Array, kind: str, width: int) -> Array:
    """An integer of type `kind` in a register of `width` bits: extended by its sign, or cut."""
    bits = WIDTHS[kind]
    if value.itemsize * 8 > bits:
        value = value.astype(DTYPES[bits])
    if is_signed(kind) and bits < width:
        value = value.view({8: np.int8, **SIGNED}[bits])
    return value.astype(DTYPES[width])


def typed(value: Array, kind: str) -> Array:
    """A register read as type `kind`."""
    bits = WIDTHS[kind]
    if bits > 1 and value.itemsize * 8 > bits:
        value = value.astype(DTYPES[bits])
    return value.view(SIGNED[bits]) if is_signed(kind) else value


def simple(code: Code, i: Instruction, width: int, f: Callable[..., Array]) -> Step:
    """d = f(a, b, …), all of `width` bits."""
    d = code.slots[i.operands[0].name]
    sources = [code.slot(operand, width) for operand in i.operands[1:]]
    if len(sources) == 1:
        (a,) = sources
        return lambda m: m.put(d, f(m.r[a]))
    if len(sources) == 2:
        a, b = sources
        return lambda m: m.put(d, f(m.r[a], m.r[b]))
    a, b, c = sources
    return lambda m: m.put(d, f(m.r[a], m.r[b], m.r[c]))


def float_kind(i: Instruction) -> str | None:
    """The type of an arithmetic instruction on floats, or None; only round to nearest is known."""
    parts = i.parts
    if any(p in ("rz", "rm", "rp", "sat", "relu", "xorsign") for p in parts):
        raise unsupported(i)
    return parts[-1] if parts[-1] in FLOATS else None


# Integers


def wide(a: Array, kind: str) -> Array:
    """Twice as many bits."""
    return typed(a, kind).astype(SIGNED[2 * WIDTHS[kind]] if is_signed(kind) else DTYPES[2 * WIDTHS[kind]])


def unsigned(a: Array) -> Array:
    return a.view(DTYPES[a.itemsize * 8]) if a.dtype != np.bool_ else a


def high_product(a: Array, b: Array, kind: str) -> Array:
    bits = WIDTHS[kind]
    if bits < 64:
        return unsigned(wide(a, kind) * wide(b, kind) >> bits).astype(DTYPES[bits])
    low = np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> np.uint64(32), b & low, b >> np.uint64(32)
    middle = a1 * b0 + (a0 * b0 >> np.uint64(32))
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> np.uint64(32)) + (other >> np.uint64(32))
    if is_signed(kind):
        high = high - np.where(a.view(np.int64) < 0, b, 0) - np.where(b.view(np.int64) < 0, a, 0)
    return high.astype(np.uint64)


def quotient(a: Array, b: Array, kind: str) -> Array:
    a, b = np.broadcast_arrays(typed(a, kind), typed(b, kind))
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    q = (a - np.fmod(a, safe)) // safe
    return unsigned(np.ascontiguousarray(np.where(b == 0, -1 if is_signed(kind) else np.iinfo(a.dtype).max, q)))


def remainder(a: Array, b: Array, kind: str) -> Array:
    a, b = np.broadcast_arrays(typed(a, kind), typed(b, kind))
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    return unsigned(np.ascontiguousarray(np.where(b == 0, a, np.fmod(a, safe))))


@op("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "abs", "neg")
def arithmetic(code: Code, i: Instruction) -> Step:
    name, kind = i.parts[0], i.parts[-1]
    if (as_float := float_kind(i)) is not None:
        return float_arithmetic(code, i, as_float)
    if kind not in WIDTHS or "cc" in i.parts or "sat" in i.parts:
        raise unsupported(i)
    width = WIDTHS[kind]
    if width not in SIGNED or kind[0] not in "su":
        raise unsupported(i)
    if name in ("mul", "mad"):
        mode = i.parts[1]
        if mode == "wide":
            d = code.slots[i.operands[0].name]
            a, b = (code.slot(o, width) for o in i.operands[1:3])
            if name == "mul":
                return lambda m: m.put(d, unsigned(wide(m.r[a], kind) * wide(m.r[b], kind)))
            c = code.slot(i.operands[3], 2 * width)
            return lambda m: m.put(d, unsigned(wide(m.r[a], kind) * wide(m.r[b], kind)) + m.r[c])
        product = {"lo": lambda a, b: a * b, "hi": lambda a, b: high_product(a, b, kind)}[mode]
        return simple(code, i, width, product if name == "mul" else lambda a, b, c: product(a, b) + c)
    f: dict[str, Callable[..., Array]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "div": lambda a, b: quotient(a, b, kind),
        "rem": lambda a, b: remainder(a, b, kind),
        "min": lambda a, b: unsigned(np.minimum(typed(a, kind), typed(b, kind))),
        "max": lambda a, b: unsigned(np.maximum(typed(a, kind), typed(b, kind))),
        "abs": lambda a: unsigned(np.abs(typed(a, kind))),
        "neg": lambda a: (~a + DTYPES[width](1)).astype(DTYPES[width]),
    }
    return simple(code, i, width, f[name])


@op("and", "or", "xor", "not")
def bitwise(code: Code, i: Instruction) -> Step:
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not}[i.parts[0]]
    return simple(code, i, WIDTHS[i.parts[-1]], f)


@op("shl", "shr")
def shift(code: Code, i: Instruction) -> Step:
    kind, width = i.parts[-1], WIDTHS[i.parts[-1]]
    d, a, b = code.slots[i.operands[0].name], code.slot(i.operands[1], width), code.slot(i.operands[2], 32)

    def step(m: Machine) -> None:
        amount = m.r[b]
        clamped = np.minimum(amount, width - 1).astype(DTYPES[width])
        if i.parts[0] == "shr" and is_signed(kind):
            m.put(d, unsigned(typed(m.r[a], kind) >> clamped.view(SIGNED[width])))
            return
        value = m.r[a] << clamped if i.parts[0] == "shl" else m.r[a] >> clamped
        m.put(d, np.where(amount >= width, DTYPES[width](0), value) if amount.max() >= width else value)

    return step


@op("shf")
def funnel_shift(code: Code, i: Instruction) -> Step:
    left, wrap = i.parts[1] == "l", i.parts[2] == "wrap"

    def f(a: Array, b: Array, c: Array) -> Array:
        n = (c & 31 if wrap else np.minimum(c, 32)).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        return (both << n >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return simple(code, i, 32, f)


@op("bfe")
def extract(code: Code, i: Instruction) -> Step:
    kind, width = i.parts[-1], WIDTHS[i.parts[-1]]
    d, a = code.slots[i.operands[0].name], code.slot(i.operands[1], width)
    b, c = code.slot(i.operands[2], 32), code.slot(i.operands[3], 32)

    def step(m: Machine) -> None:
        start, length = m.r[b].astype(np.int64) & 255, m.r[c].astype(np.int64) & 255
        value = typed(m.r[a], kind).astype(object if width == 64 and not is_signed(kind) else np.int64)
        value = value >> np.minimum(start, width - 1)
        if (start >= width).any():
            raise PtxError(f"a field that starts outside: {i.text}")
        keep = np.minimum(length, width - start)
        field = value & ((1 << keep.astype(object)) - 1) if width == 64 else value & ((np.int64(1) << keep) - 1)
        if is_signed(kind):
            top = (field >> np.maximum(keep - 1, 0)) & 1
            field = np.where((keep > 0) & (top == 1), field - (np.int64(1) << np.minimum(keep, 62)), field)
        m.put(d, np.asarray(field).astype(np.int64 if is_signed(kind) else DTYPES[width]).astype(DTYPES[width]))

    return step


@op("bfi")
def insert(code: Code, i: Instruction) -> Step:
    width = WIDTHS[i.parts[-1]]
    one, dtype = DTYPES[width](1), DTYPES[width]
    d = code.slots[i.operands[0].name]
    a, b = (code.slot(o, width) for o in i.operands[1:3])
    c, e = (code.slot(o, 32) for o in i.operands[3:5])

    def step(m: Machine) -> None:
        start, length = m.r[c] & 255, m.r[e] & 255
        ones = np.where(length >= width, ~dtype(0), (one << np.minimum(length, width - 1).astype(dtype)) - one)
        low = np.minimum(start, width - 1).astype(dtype)
        mask = np.where(start >= width, dtype(0), ones.astype(dtype) << low).astype(dtype)
        m.put(d, (m.r[b] & ~mask) | (m.r[a] << low & mask))

    return step


@op("popc", "clz", "brev", "ffs", "bfind")
def bit_count(code: Code, i: Instruction) -> Step:
    name, width = i.parts[0], WIDTHS[i.parts[-1]]
    if name in ("ffs", "bfind"):
        raise unsupported(i)

    def f(a: Array) -> Array:
        bits = np.unpackbits(a.astype(f">u{width // 8}").view(np.uint8).reshape(-1, width // 8), axis=1)  # high first
        if name == "popc":
            return bits.sum(axis=1).astype(np.uint32)
        if name == "clz":
            return np.where(bits.any(axis=1), bits.argmax(axis=1), width).astype(np.uint32)
        return np.packbits(bits[:, ::-1], axis=1).view(f">u{width // 8}").reshape(-1).astype(DTYPES[width])

    return simple(code, i, width, f)


@op("prmt")
def permute(code: Code, i: Instruction) -> Step:
    if i.parts[1:] != ["b32"]:
        raise unsupported(i)

    def f(a: Array, b: Array, c: Array) -> Array:
        a, b, c = np.broadcast_arrays(a, b, c)
        pool = (b.astype(np.uint64) << np.uint64(32) | a).view(np.uint8).reshape(-1, 8).view(np.int8)
        choice = (c[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        byte = np.take_along_axis(pool, (choice & 7).astype(np.int64), axis=1)
        byte = np.where(choice & 8, byte >> 7, byte).astype(np.int8)  # the sign, eight times
        return np.ascontiguousarray(byte).view(np.uint32).reshape(-1)

    return simple(code, i, 32, f)


@op("lop3")
def logic(code: Code, i: Instruction) -> Step:
    d = code.slots[i.operands[0].name]
    a, b, c = (code.slot(o, 32) for o in i.operands[1:4])
    table = i.operands[4].bits(8)

    def step(m: Machine) -> None:
        x, y, z = m.r[a], m.r[b], m.r[c]
        value = np.zeros(1, np.uint32)
        for row in range(8):
            if table >> row & 1:
                value = value | (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        m.put(d, value)

    return step


@op("dp4a")
def dot4(code: Code, i: Instruction) -> Step:
    kinds = [np.int8 if kind == "s32" else np.uint8 for kind in i.parts[1:3]]

    def f(a: Array, b: Array, c: Array) -> Array:
        x, y = (v.view(kind).reshape(-1, 4).astype(np.int64) for v, kind in zip((a, b), kinds, strict=True))
        return ((x * y).sum(axis=1) + c).astype(np.uint32)

    return simple(code, i, 32, f)


# Floats


def float_arithmetic(code: Code, i: Instruction, kind: str) -> Step:
    name, number = i.parts[0], FLOATS[kind]
    width = WIDTHS[kind]
    double = kind in ("f32", "f32x2")
    nan = "NaN" in i.parts

    def fma(a: Array, b: Array, c: Array) -> Array:
        return a.astype(np.float64) * b + c if double else a * b + c

    f: dict[str, Callable[..., Array]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "mad": fma,
        "fma": fma,
        "min": lambda *values: reduce(np.minimum if nan else np.fmin, values),  # of two, and from sm_100 on of three
        "max": lambda *values: reduce(np.maximum if nan else np.fmax, values),
        "abs": np.abs,
        "neg": np.negative,
    }
    if name not in f:
        raise unsupported(i)
    compute = f[name]
    if len(i.parts) > 2 and i.parts[-2] == "f32" and kind in ("f16", "bf16"):  # add.rn.f32.bf16: mixed
        d = code.slots[i.operands[0].name]
        small = {"add": 1, "sub": 1, "fma": 2}[name]
        slots = [code.slot(o, width if n < small else 32) for n, o in enumerate(i.operands[1:])]

        def mixed(m: Machine) -> None:
            loaded = [(number if n < small else FLOATS["f32"]).load(m.r[s]) for n, s in enumerate(slots)]
            m.put(d, FLOATS["f32"].store(compute(*(x.astype(np.float64) for x in loaded))))

        return mixed
    return simple(code, i, width, lambda *values: number.store(compute(*(number.load(v) for v in values))))


@op("sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", "copysign")
def function(code: Code, i: Instruction) -> Step:
    kind = float_kind(i)
    if kind is None:
        raise unsupported(i)
    number = FLOATS[kind]
    f: dict[str, Callable[..., Array]] = {
        "sqrt": np.sqrt,
        "rsqrt": lambda a: 1 / np.sqrt(a),
        "rcp": lambda a: 1 / a,
        "ex2": np.exp2,
        "lg2": np.log2,
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
        "copysign": lambda a, b: np.copysign(b, a),
    }
    compute = f[i.parts[0]]
    return simple(code, i, WIDTHS[kind], lambda *values: number.store(compute(*(number.load(v) for v in values))))


# Comparison and choice

COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    if kind not in FLOATS:
        compare = COMPARE[name]
        return lambda a, b: compare(typed(a, kind), typed(b, kind))
    load = FLOATS[kind].load
    if name == "num":
        return lambda a, b: ~(np.isnan(load(a)) | np.isnan(load(b)))
    if name == "nan":
        return lambda a, b: np.isnan(load(a)) | np.isnan(load(b))
    if name in COMPARE:  # ordered: false with a NaN, and "not equal" as well
        compare = COMPARE[name]
        if name == "ne":
            return lambda a, b: (load(a) != load(b)) & ~np.isnan(load(a)) & ~np.isnan(load(b))
        return lambda a, b: compare(load(a), load(b))
    compare = COMPARE[name[:-1]]  # equ, neu, ltu, …: true with a NaN
    return lambda a, b: compare(load(a), load(b)) | np.isnan(load(a)) | np.isnan(load(b))


@op("setp", "set")
def compare(code: Code, i: Instruction) -> Step:
    kind = i.parts[-1]
    if i.parts[0] == "set" or kind in ("f16x2", "bf16x2"):
        raise unsupported(i)
    f = comparison(i.parts[1], kind)
    width = WIDTHS[kind]
    d = None if isinstance(i.operands[0], Sink) else code.slots[i.operands[0].name]
    q = None if i.second is None else code.slots[i.second.name]
    a, b = (code.slot(o, width) for o in i.operands[1:3])
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(i.parts[2])
    c = code.slot(i.operands[3], 1) if len(i.operands) > 3 else None
    if (combine is None) != (c is None):
        raise unsupported(i)

    def step(m: Machine) -> None:
        value = f(m.r[a], m.r[b])
        other = ~value
        if c is not None:
            value, other = combine(value, m.r[c]), combine(other, m.r[c])
        if d is not None:
            m.put(d, value)
        if q is not None:
            m.put(q, other)

    return step


@op("selp")
def select(code: Code, i: Instruction) -> Step:
    width = WIDTHS[i.parts[-1]]
    d, a, b = code.slots[i.operands[0].name], code.slot(i.operands[1], width), code.slot(i.operands[2], width)
    p = code.slot(i.operands[3], 1)
    return lambda m: m.put(d, np.where(m.r[p], m.r[a], m.r[b]))


# Conversion and movement

FROM_INTEGER = {"f32": np.float32, "f64": np.float64, "f16": np.float64, "bf16": np.float64}
TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, kind: str, rounding: Callable[[Array], Array]) -> Array:
    """Saturated; NaN is 0."""
    info = np.iinfo(np.dtype(f"{'i' if is_signed(kind) else 'u'}{WIDTHS[kind] // 8}"))
    whole = rounding(np.where(np.isnan(x), 0, x).astype(np.float64))
    inside = np.clip(whole, float(info.min), float(info.max))
    value = np.where(whole >= float(info.max), info.max, np.where(whole <= float(info.min), info.min, 0))
    plain = (whole < float(info.max)) & (whole > float(info.min))
    return unsigned(np.where(plain, np.where(plain, inside, 0).astype(info.dtype), value.astype(info.dtype)))


@op("cvt")
def convert(code: Code, i: Instruction) -> Step:
    if i.parts[1] == "pack":
        return convert_pack(code, i)
    to, source, modifiers = i.parts[-2], i.parts[-1], set(i.parts[1:-2])
    if modifiers - {"rn", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "satfinite", "rna"}:
        raise unsupported(i)
    d = code.slots[i.operands[0].name]
    width = code.widths[d]
    if to in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") or source in ("e4m3x2", "e5m2x2"):
        return convert_pair(code, i, to, source)
    a = code.slot(i.operands[1], WIDTHS[source])
    rounding = next((TO_WHOLE[m] for m in modifiers if m in TO_WHOLE), None)
    if to in FLOATS:
        store = FLOATS[to].store
        if source in FLOATS:
            load = FLOATS[source].load
            if to == "bf16" and source == "f32":
                return lambda m: m.put(d, bf16_from_f32(load(m.r[a])))
            if rounding is not None:
                return lambda m: m.put(d, store(rounding(load(m.r[a]))))
            if "sat" in modifiers:
                raise unsupported(i)
            dtype = np.float32 if to == "f32" else np.float64
            return lambda m: m.put(d, store(load(m.r[a]).astype(dtype)))
        dtype = FROM_INTEGER[to]
        return lambda m: m.put(d, store(small(m.r[a], source).astype(dtype)))
    if to == "tf32":
        if source != "f32" or "rna" not in modifiers:
            raise unsupported(i)
        return lambda m: m.put(d, m.r[a] + np.uint32(0x1000) & np.uint32(0xFFFFE000))
    if source in FLOATS:
        if rounding is None:
            raise unsupported(i)
        load = FLOATS[source].load
        return lambda m: m.put(d, resized(to_integer(load(m.r[a]), to, rounding), to, width))
    if "sat" in modifiers:
        info = np.iinfo(f"{'i' if is_signed(to) else 'u'}{WIDTHS[to] // 8}")
        return lambda m: m.put(
            d, resized(np.clip(small(m.r[a], source).astype(np.int64), info.min, info.max).astype(np.uint64), to, width)
        )

    def integers(m: Machine) -> None:
        value = resized(m.r[a], source, max(width, WIDTHS[source]))
        m.put(d, resized(value, to, width))

    return integers


def small(value: Array, kind: str) -> Array:
    """`typed`, for 8 bits in a wider register as well."""
    return (
        value.astype(np.uint8).view(np.int8 if is_signed(kind) else np.uint8) if kind[1:] == "8" else typed(value, kind)
    )


def convert_pair(code: Code, i: Instruction, to: str, source: str) -> Step:
    """cvt of two values at once: from two f32, or between packed types."""
    d = code.slots[i.operands[0].name]

    def store(high: Array, low: Array) -> Array:
        if to in ("e4m3x2", "e5m2x2"):
            high, low = np.broadcast_arrays(fp8_from_f32(high, to[:4]), fp8_from_f32(low, to[:4]))
            return low.astype(np.uint16) | high.astype(np.uint16) << np.uint16(8)
        if to == "bf16x2":
            bits = bf16_from_f32
        else:

            def bits(x: Array) -> Array:
                return x.astype(np.float16).view(np.uint16)

        return bits(low).astype(np.uint32) | bits(high).astype(np.uint32) << np.uint32(16)

    if source == "f32":
        a, b = (code.slot(o, 32) for o in i.operands[1:3])
        return lambda m: m.put(d, store(m.r[a].view(np.float32), m.r[b].view(np.float32)))
    a = code.slot(i.operands[1], WIDTHS[source])
    if source in ("e4m3x2", "e5m2x2"):
        table = FP8[source[:4]]

        def load(bits: Array) -> tuple[Array, Array]:
            return table[bits >> 8 & 0xFF], table[bits & 0xFF]

    elif source in ("f16x2", "bf16x2"):
        number = FLOATS[source]

        def load(bits: Array) -> tuple[Array, Array]:
            pair = number.load(bits).astype(np.float32)
            return pair[:, 1], pair[:, 0]

    else:
        raise unsupported(i)
    return lambda m: m.put(d, store(*load(m.r[a])))


def convert_pack(code: Code, i: Instruction) -> Step:
    """cvt.pack.sat.s8.s32.b32 d, a, b, c: two saturated values below the low half of c."""
    if i.parts[1:] not in (["pack", "sat", "s8", "s32", "b32"], ["pack", "sat", "u8", "s32", "b32"]):
        raise unsupported(i)
    low, high = (-128, 127) if i.parts[3] == "s8" else (0, 255)

    def f(a: Array, b: Array, c: Array) -> Array:
        a, b = (np.clip(v.view(np.int32), low, high).astype(np.uint32) & np.uint32(255) for v in (a, b))
        return c << np.uint32(16) | a << np.uint32(8) | b

    return simple(code, i, 32, f)


def special(m: Machine, name: str) -> Array:
    """The value of a special register."""
    x, y, _ = m.grid
    base, _, axis = name[1:].partition(".")
    cta = np.repeat(m.ctas, m.per_cta)
    values: dict[str, Callable[[], object]] = {
        "tid": lambda: m.tid if axis == "x" else 0,
        "ntid": lambda: m.per_cta if axis == "x" else 1,
        "ctaid": lambda: {"x": cta % x, "y": cta // x % y, "z": cta // (x * y)}[axis],
        "nctaid": lambda: m.grid["xyz".index(axis)],
        "laneid": lambda: m.tid % 32,
        "warpid": lambda: m.tid // 32,
        "lanemask_lt": lambda: (np.uint64(1) << (m.tid % 32).astype(np.uint64)) - np.uint64(1),
        "cluster_ctarank": lambda: 0,
        "cluster_ctaid": lambda: 0,
        "cluster_nctaid": lambda: 1,
        "clock": lambda: 0,
        "clock64": lambda: 0,
        "globaltimer": lambda: 0,
    }
    if base not in values:
        raise PtxError(f"unknown special register: {name}")
    return np.atleast_1d(np.asarray(values[base](), np.uint64)).astype(np.uint32)


@op("mov")
def move(code: Code, i: Instruction) -> Step:
    target, source = i.operands
    width = WIDTHS[i.parts[-1]]
    if isinstance(target, Vector):
        part = width // len(target.items)
        slots = [None if isinstance(o, Sink) else code.slots[o.name] for o in target.items]
        a = code.slot(source, width)

        def unpack(m: Machine) -> None:
            value = m.r[a]
            for n, slot in enumerate(slots):
                if slot is not None:
                    m.put(slot, (value >> DTYPES[width](n * part)).astype(DTYPES[part]))

        return unpack
    d = code.slots[target.name]
    if isinstance(source, Vector):
        part = width // len(source.items)
        parts = [code.slot(o, part) for o in source.items]

        def pack(m: Machine) -> None:
            value = np.zeros(1, DTYPES[width])
            for n, slot in enumerate(parts):
                # LLVM packs registers that it never wrote where that half is never used; here it is NaN.
                element = np.full(1, -1).astype(DTYPES[part]) if m.r[slot] is None else m.r[slot]
                value = value | element.astype(DTYPES[width]) << DTYPES[width](n * part)
            m.put(d, value)

        return pack
    if isinstance(source, Symbol):
        if source.name.startswith("%"):
            dtype = DTYPES[code.widths[d]]
            return lambda m: m.put(d, special(m, source.name).astype(dtype))
        if source.name not in code.program.shared:
            raise unsupported(i)
        where = np.array([SHARED_BASE + code.program.shared[source.name]], DTYPES[width])
        return lambda m: m.put(d, where)
    a = code.slot(source, width)

    def copy(m: Machine) -> None:
        if m.r[a] is None:
            raise PtxError(f"read before it is written: {i.text}")
        m.put(d, m.r[a])

    return copy


@op("cvta")
def convert_address(code: Code, i: Instruction) -> Step:
    if "shared" in i.parts:
        raise unsupported(i)
    return simple(code, i, 64, lambda a: a)


# Memory

HINTS = {
    "volatile", "relaxed", "acquire", "release", "acq_rel", "weak", "cta", "cluster", "gpu", "sys", "nc", "mmio",
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_first", "L1::evict_last", "L1::evict_normal",
    "L1::evict_unchanged", "L1::no_allocate", "L2::cache_hint", "L2::evict_first", "L2::evict_last",
    "L2::evict_normal", "L2::64B", "L2::128B", "L2::256B", "shared::cta", "sync", "aligned",
}  # fmt: skip


def address_of(code: Code, operand: object) -> Callable[[Machine], Array]:
    if not isinstance(operand, Address):
        raise PtxError(f"not an address: {operand}")
    base, offset = operand.base, operand.offset
    if isinstance(base, Symbol):
        at = np.array([SHARED_BASE + code.program.shared[base.name] + offset], np.uint32)
        return lambda m: at
    slot = code.slot(base, 64)
    if offset == 0:
        return lambda m: m.r[slot]
    return lambda m: m.r[slot] + m.r[slot].dtype.type(offset % (1 << m.r[slot].itemsize * 8))


def access_form(i: Instruction) -> tuple[str, int, str]:
    """(space, vector, type) of ld, st, atom and red."""
    parts = i.parts[1:]
    space = "shared" if {"shared", "shared::cta"} & set(parts) else "global"
    vector = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
    if parts[-1] not in WIDTHS or WIDTHS[parts[-1]] not in (8, 16, 32, 64):
        raise unsupported(i)
    if set(parts[:-1]) - HINTS - {"shared", "global", f"v{vector}"}:
        raise unsupported(i)
    if not {"shared", "shared::cta", "global"} & set(parts):
        raise unsupported(i)  # generic addresses
    return space, vector, parts[-1]


@op("ld")
def load(code: Code, i: Instruction) -> Step:
    target, address = i.operands[:2]
    if i.parts[1] == "param":
        return load_param(code, i)
    space, vector, kind = access_form(i)
    size = WIDTHS[kind] // 8
    items = target.items if isinstance(target, Vector) else (target,)
    if len(items) != vector:
        raise unsupported(i)
    slots = [None if isinstance(o, Sink) else code.slots[o.name] for o in items]
    where = address_of(code, address)
    nbytes = size * vector

    def step(m: Machine) -> None:
        at, lanes, who = m.access(space, where(m), nbytes, nbytes, i.text)
        if space == "global":
            words = m.memory.load(at, size, vector)
        else:
            words = m.shared.load(at, size, vector, m.warps_of(lanes), who)
        for n, slot in enumerate(slots):
            if slot is not None:
                m.put_at(slot, resized(np.ascontiguousarray(words[:, n]), kind, code.widths[slot]), lanes)

    return step


def load_param(code: Code, i: Instruction) -> Step:
    target, address = i.operands
    index, nbytes = code.program.params[address.base.name]
    kind = i.parts[-1]
    if address.offset or isinstance(target, Vector):
        raise unsupported(i)
    d = code.slots[target.name]
    mask = (1 << 8 * min(nbytes, WIDTHS[kind] // 8)) - 1

    def step(m: Machine) -> None:
        value = np.array([m.params[index] & mask], DTYPES[WIDTHS[kind]])
        m.put(d, resized(value, kind, code.widths[d]))

    return step


@op("st")
def store(code: Code, i: Instruction) -> Step:
    address, source = i.operands[:2]
    space, vector, kind = access_form(i)
    width = WIDTHS[kind]
    items = source.items if isinstance(source, Vector) else (source,)
    if len(items) != vector:
        raise unsupported(i)
    slots = [code.slot(o, width) for o in items]
    where = address_of(code, address)
    nbytes = width // 8 * vector

    def step(m: Machine) -> None:
        at, lanes, who = m.access(space, where(m), nbytes, nbytes, i.text)
        if len(at) == 1 and lanes is None:
            at = np.repeat(at, m.threads)
        words = np.empty((len(at), vector), WORDS[width // 8])
        for n, slot in enumerate(slots):
            value = m.r[slot]
            words[:, n] = value if lanes is None or len(value) == 1 else value[lanes]
        if space == "global":
            m.memory.store(at, words, who)
        else:
            m.shared.store(at, words, m.warps_of(lanes), who)

    return step


@op("atom", "red")
def atomic(code: Code, i: Instruction) -> Step:
    """One thread after the other, in their order."""
    kind = i.parts[-1]
    name = next((p for p in i.parts if p in ("add", "cas", "exch", "min", "max", "and", "or", "xor", "inc")), None)
    returns = i.parts[0] == "atom"
    hints = {"shared", "global", "noftz", name} | HINTS
    if name is None or set(i.parts[1:-1]) - hints or kind in ("f16x2", "bf16x2"):
        raise unsupported(i)
    space = "shared" if {"shared", "shared::cta"} & set(i.parts) else "global"
    width, size = WIDTHS[kind], WIDTHS[kind] // 8
    number: Float | None = FLOATS.get(kind)
    operands = i.operands[1:] if returns else i.operands
    d = code.slots[i.operands[0].name] if returns and not isinstance(i.operands[0], Sink) else None
    where = address_of(code, operands[0])
    slots = [code.slot(o, width) for o in operands[1 : 3 if name == "cas" else 2]]

    def update(old: Array, values: list[Array]) -> Array:
        if number is not None and name in ("add", "min", "max"):
            f = {"add": np.add, "min": np.fmin, "max": np.fmax}[name]
            return number.store(f(number.load(old), number.load(values[0])))
        if name == "cas":
            return np.where(old == values[0], values[1], old)
        if name == "exch":
            return values[0]
        if name == "inc":
            return np.where(old >= values[0], 0, old + 1).astype(old.dtype)
        f = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
             "xor": np.bitwise_xor}[name]  # fmt: skip
        return unsigned(
            f(typed(old, kind) if kind[0] in "su" else old, typed(values[0], kind) if kind[0] in "su" else values[0])
        )

    def step(m: Machine) -> None:
        at, lanes, who = m.access(space, where(m), size, size, i.text)
        if len(at) == 1 and lanes is None:
            at = np.repeat(at, m.threads)
        values = [m.full(slot) if lanes is None else m.full(slot)[lanes] for slot in slots]
        memory = (m.memory if space == "global" else m.shared).bytes.view(WORDS[size])
        index = at // size
        old = np.empty(len(at), WORDS[size])
        # Threads with different addresses go together; the k-th thread of an address in round k.
        order = np.argsort(index, kind="stable")
        first = np.r_[True, index[order][1:] != index[order][:-1]]
        rank = np.empty(len(at), np.int64)
        rank[order] = np.arange(len(at)) - np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
        for round_ in range(int(rank.max()) + 1):
            now = rank == round_
            old[now] = memory[index[now]]
            memory[index[now]] = update(old[now], [v[now] for v in values])
        if space == "global":
            m.memory.mark_written(at)
        else:
            m.shared.writer.reshape(-1, size)[index] = (m.warps_of(lanes) + 1)[:, None]
        if d is not None:
            m.put_at(d, old, lanes)

    return step


@op("cp")
def copy_async(code: Code, i: Instruction) -> Step:
    form = i.parts[1:]
    if form[:1] != ["async"]:
        raise unsupported(i)
    if form == ["async", "commit_group"]:
        return lambda m: m.commit()
    if form == ["async", "wait_group"]:
        newest = i.operands[0].bits(32)
        return lambda m: m.wait(newest)
    if form == ["async", "wait_all"]:
        return lambda m: m.wait_all()
    if len(form) < 4 or set(form[1:]) - {"ca", "cg", "shared", "shared::cta", "global"} - HINTS:
        raise unsupported(i)
    target, source = (address_of(code, o) for o in i.operands[:2])
    nbytes = i.operands[2].bits(32)
    rest = i.operands[3:-1] if "L2::cache_hint" in form else i.operands[3:]
    if rest and isinstance(rest[0], Register) and rest[0].width == 1:
        raise unsupported(i)
    taken_slot = code.slot(rest[0] if rest else i.operands[2], 32)

    def step(m: Machine) -> None:
        to, lanes, who = m.access("shared", target(m), nbytes, nbytes, i.text)
        everyone = np.arange(m.threads) if lanes is None else lanes
        taken = m.full(taken_slot)[everyone].astype(np.int64)
        if (taken > nbytes).any():
            raise PtxError(f"the source is larger than the copy: {i.text}")
        address = source(m)
        address = (np.repeat(address, m.threads) if len(address) == 1 else address)[everyone]
        start = np.zeros(len(everyone), np.int64)
        for size in np.unique(taken[taken > 0]):
            rows = np.flatnonzero(taken == size)
            start[rows] = m.memory.offsets(address[rows], int(size), nbytes, m.who(everyone[rows], i.text))
        m.shared.claim(to, nbytes, m.warp[everyone], who)
        m.shared.writer.reshape(-1, nbytes)[to // nbytes] = PENDING
        m.open.append(AsyncCopy(everyone, start, to, nbytes, taken, i.text))

    return step


@op("ldmatrix", "stmatrix")
def matrix(code: Code, i: Instruction) -> Step:
    """Eight rows of 16 bytes per 8×8 matrix of b16; row r of matrix k is at the address of lane 8k + r."""
    form = i.parts[1:]
    count = {"x1": 1, "x2": 2, "x4": 4}.get(next((p for p in form if p in ("x1", "x2", "x4")), ""))
    if count is None or "m8n8" not in form or form[-1] != "b16":
        raise unsupported(i)
    loads, transposed = i.parts[0] == "ldmatrix", "trans" in form
    registers, address = i.operands if loads else i.operands[::-1]
    slots = [code.slots[o.name] for o in registers.items]
    where = address_of(code, address)
    if len(slots) != count:
        raise unsupported(i)

    def step(m: Machine) -> None:
        warps = m.whole_warps(i.text)
        warps = np.arange(m.threads // 32) if warps is None else warps
        address = where(m)
        address = np.repeat(address, m.threads) if len(address) == 1 else address
        rows = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        who = m.who(rows, i.text)
        at = m.shared.offsets(address[rows], m.cta[rows], 16, 16, who)
        lanes = (warps[:, None] * 32 + np.arange(32)).reshape(-1)
        chosen = None if m.mask is None else lanes
        if loads:
            words = m.shared.load(at, 2, 8, m.warp[rows], who).reshape(len(warps), count, 8, 8)
            if transposed:
                words = words.swapaxes(2, 3)
            fragments = np.ascontiguousarray(words).view(np.uint32).reshape(len(warps), count, 32)
            for n, slot in enumerate(slots):
                m.put_at(slot, fragments[:, n].reshape(-1), chosen)
            return
        fragments = np.stack([m.full(slot)[lanes].reshape(-1, 32) for slot in slots], axis=1)
        words = np.ascontiguousarray(fragments).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            words = words.swapaxes(2, 3)
        m.shared.store(at, np.ascontiguousarray(words.reshape(-1, 8)), m.warp[rows], who)

    return step


# Warps and barriers


@op("shfl")
def shuffle(code: Code, i: Instruction) -> Step:
    mode = i.parts[2]
    if i.parts[1] != "sync" or mode not in ("bfly", "idx", "up", "down") or i.parts[3] != "b32":
        raise unsupported(i)
    d = code.slots[i.operands[0].name]
    p = None if i.second is None else code.slots[i.second.name]
    a, b, c, members = (code.slot(o, 32) for o in i.operands[1:5])

    def step(m: Machine) -> None:
        lane = (m.tid % 32).astype(np.int64)
        value, amount, limits = m.full(a), m.full(b).astype(np.int64) & 31, m.full(c).astype(np.int64)
        active = np.ones(m.threads, bool) if m.mask is None else m.mask
        named = (m.full(members)[active] >> (m.tid[active] % 32)) & 1
        if not named.all():
            raise PtxError(f"a thread that is not in its own member mask: {i.text}")
        clamp, segment = limits & 31, limits >> 8 & 31
        top = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            source = lane - amount
            inside = source >= top
        elif mode == "down":
            source = lane + amount
            inside = source <= top
        else:
            source = lane ^ amount if mode == "bfly" else (lane & segment) | (amount & ~segment)
            inside = source <= top
        source = np.where(inside, source, lane) + np.arange(m.threads) // 32 * 32
        if not active[source[active]].all():
            raise PtxError(f"reads from a thread that does not take part: {i.text}")
        m.put(d, value[source])
        if p is not None:
            m.put(p, inside)

    return step


@op("vote")
def vote(code: Code, i: Instruction) -> Step:
    mode, kind = i.parts[2], i.parts[3]
    if i.parts[1] != "sync" or mode not in ("ballot", "any", "all"):
        raise unsupported(i)
    d, a = code.slots[i.operands[0].name], code.slot(i.operands[1], 1)

    def step(m: Machine) -> None:
        active = np.ones(m.threads, bool) if m.mask is None else m.mask
        value, active = m.full(a).reshape(-1, 32), active.reshape(-1, 32)
        if mode == "ballot":
            result = ((value & active).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1)
            m.put(d, np.repeat(result.astype(np.uint32), 32))
        else:
            result = (value & active).any(axis=1) if mode == "any" else (value | ~active).all(axis=1)
            m.put(d, np.repeat(result, 32))

    if (mode == "ballot") != (kind == "b32"):
        raise unsupported(i)
    return step


@op("redux")
def reduce_warp(code: Code, i: Instruction) -> Step:
    name, kind = i.parts[2], i.parts[-1]
    f = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
         "xor": np.bitwise_xor}.get(name)  # fmt: skip
    if f is None or kind not in ("s32", "u32", "b32"):
        raise unsupported(i)
    d, a = code.slots[i.operands[0].name], code.slot(i.operands[1], 32)

    def step(m: Machine) -> None:
        m.whole_warps(i.text)
        value = typed(m.full(a), kind).reshape(-1, 32)
        m.put(d, np.repeat(unsigned(f.reduce(value, axis=1, dtype=value.dtype)), 32))

    return step


@op("bar", "barrier")
def barrier(code: Code, i: Instruction) -> Step:
    form = i.parts[1:]
    if form[0] == "warp":
        return lambda m: m.whole_warps(i.text) and None
    if "sync" not in form or "red" in form:
        raise unsupported(i)
    if len(i.operands) > 1 and i.operands[1].bits(32) != code.program.threads:
        raise unsupported(i)
    return lambda m: m.barrier(i.text)


@op("fence", "membar", "griddepcontrol", "nanosleep", "prefetch", "discard", "applypriority")
def nothing(code: Code, i: Instruction) -> Step:
    return lambda m: None


@op("createpolicy")
def policy(code: Code, i: Instruction) -> Step:
    return lambda m: m.put(code.slots[i.operands[0].name], np.zeros(1, np.uint64))


@op("trap")
def trap(code: Code, i: Instruction) -> Step:
    def step(m: Machine) -> None:
        raise PtxError(f"the kernel trapped, {m.thread(0 if m.mask is None else int(np.argmax(m.mask)))}")

    return step


@op("mma")
def mma(code: Code, i: Instruction) -> Step:
    form = tensor_cores.form(i)
    groups = []
    for operand in i.operands[:4]:
        items = operand.items if isinstance(operand, Vector) else (operand,)
        groups.append([code.slot(o, 32) for o in items])
    d, a, b, c = groups
    e = code.slot(i.operands[4], 32) if form.sparse else None
    selector = i.operands[5].bits(32) if form.sparse else 0
    tensor_cores.check(form, [len(g) for g in groups], selector, i)

    def step(m: Machine) -> None:
        m.whole_warps(i.text)

        def read(slots: list[int]) -> Array:
            return np.stack([m.full(slot).reshape(-1, 32) for slot in slots])

        metadata = None if e is None else m.full(e).reshape(-1, 32)
        active = None if m.mask is None else m.mask.reshape(-1, 32)[:, 0]
        result = tensor_cores.multiply(form, read(a), read(b), read(c), metadata, selector, active, i.text)
        for slot, fragment in zip(d, result, strict=True):
            m.put(slot, np.ascontiguousarray(fragment).reshape(-1))

    return step
