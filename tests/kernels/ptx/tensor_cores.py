"""mma.sync and mma.sp.sync, from the figures of the PTX ISA ("Matrix fragments for …").

A lane of a warp has g = lane / 4 (groupID) and t = lane % 4 (threadID_in_group). A register of 32 bits holds S
neighbouring elements: two of 16 bits, four of 8 bits, one of tf32. In terms of registers, all shapes are one picture:

    A, row-major [16, k]   register r holds row g + 8 (r & 1), elements S (4 (r >> 1) + t) + 0 … S - 1 of the row
    B, column-major [k, 8] register r holds column g, elements S (4 r + t) + 0 … S - 1 of the column
    C and D [16, 8]        element i is at row g + 8 (i >> 1), column 2 t + (i & 1)

A sparse A is stored as the k/2 elements that are kept, in the same picture. The metadata has two bits for each of them,
its place among its four neighbours:

    16-bit types, m16n8k32  the lanes with t = 2 F + h, F the selector: bits 0 … 15 are row g, bits 16 … 31 row g + 8,
                            each the dense columns 16 h … 16 h + 15
    8-bit types, m16n8k64   lane t: row g + 8 (t & 1), dense columns 32 (t >> 1) … + 31; the selector is 0
"""

from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.formats import FP8, bf16_to_f32
from tests.kernels.ptx.program import Instruction, PtxError

Array = np.ndarray

ELEMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}
DENSE_K = {16: (8, 16), 8: (16, 32), 32: (4, 8)}
SPARSE_K = {16: 32, 8: 64}


@dataclass(frozen=True)
class Form:
    k: int
    a: str
    b: str
    accumulator: str  # f32, s32 or f16
    sparse: bool

    @property
    def bits(self) -> int:
        return ELEMENT_BITS[self.a]


def form(i: Instruction) -> Form:
    """Read the qualifiers of an mma instruction; PtxError if it is not one of the known ones."""
    parts = i.parts
    shape = next((p for p in parts if p.startswith("m16n8k")), "m16n8k0")
    types = parts[-4:]
    known = {"mma", "sp", "sp::ordered_metadata", "sync", "aligned", "row", "col", "satfinite", "kind::f8f6f4", shape}
    result = Form(int(shape[6:]), types[1], types[2], types[0], any(p.split("::")[0] == "sp" for p in parts))
    unknown = set(parts[:-4]) - known
    if unknown or types[1] not in ELEMENT_BITS or types[2] not in ELEMENT_BITS or types[0] != types[3]:
        raise PtxError(f"unsupported form: {i.text}")
    if ELEMENT_BITS[types[1]] != ELEMENT_BITS[types[2]] or types[0] not in ("f32", "s32", "f16"):
        raise PtxError(f"unsupported form: {i.text}")
    if "satfinite" in parts or "row" not in parts or "col" not in parts:
        raise PtxError(f"unsupported form: {i.text}")
    allowed = (SPARSE_K.get(result.bits),) if result.sparse else DENSE_K[result.bits]
    if result.k not in allowed:
        raise PtxError(f"unsupported form: {i.text}")
    return result


def check(form: Form, registers: list[int], selector: int, i: Instruction) -> None:
    """Check the number of registers of D, A, B and C, and the selector."""
    stored = form.k // 2 if form.sparse else form.k
    accumulators = 2 if form.accumulator == "f16" else 4
    expected = [accumulators, 16 * stored * form.bits // 1024, 8 * form.k * form.bits // 1024, accumulators]
    if registers != expected:
        raise PtxError(f"D, A, B, C have {registers} registers, expected {expected}: {i.text}")
    if selector > (1 if form.sparse and form.bits == 16 else 0):
        raise PtxError(f"the selector is {selector}: {i.text}")


def numbers(words: Array, kind: str) -> Array:
    """The elements of registers, [..., S] float32, the lowest bits first."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    size = {16: np.uint16, 8: np.uint8}[ELEMENT_BITS[kind]]
    parts = np.ascontiguousarray(words)[..., None].view(size)
    if kind == "bf16":
        return bf16_to_f32(parts)
    if kind == "f16":
        return parts.view(np.float16).astype(np.float32)
    if kind in FP8:
        return FP8[kind][parts]
    return (parts.view(np.int8) if kind == "s8" else parts).astype(np.float32)


def matrix_a(registers: Array, kind: str) -> Array:
    """[R, warps, 32] registers as [warps, 16, columns]."""
    count, warps, _ = registers.shape
    x = numbers(registers, kind).reshape(count // 2, 2, warps, 8, 4, -1)  # column half, row half, w, g, t, s
    return np.ascontiguousarray(x.transpose(2, 1, 3, 0, 4, 5)).reshape(warps, 16, -1)


def matrix_b(registers: Array, kind: str) -> Array:
    """[R, warps, 32] registers as [warps, k, 8]."""
    count, warps, _ = registers.shape
    x = numbers(registers, kind).reshape(count, warps, 8, 4, -1)  # r, w, g, t, s
    return np.ascontiguousarray(x.transpose(1, 0, 3, 4, 2)).reshape(warps, -1, 8)


def matrix_c(registers: Array, kind: str) -> Array:
    """[R, warps, 32] registers as [warps, 16, 8], float32 or int32."""
    count, warps, _ = registers.shape
    if kind == "f16":  # a register holds both columns
        x = numbers(registers, "f16").reshape(2, warps, 8, 4, 2).transpose(1, 0, 2, 3, 4)
    else:
        typed = registers.view(np.float32 if kind == "f32" else np.int32)
        x = typed.reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1)
    return np.ascontiguousarray(x).reshape(warps, 16, 8)


def registers_d(d: Array, kind: str) -> Array:
    """The inverse of `matrix_c`: [R, warps, 32] uint32."""
    warps = len(d)
    x = d.reshape(warps, 2, 8, 4, 2)  # w, row half, g, t, column
    if kind == "f16":
        pairs = np.ascontiguousarray(x.transpose(1, 0, 2, 3, 4).astype(np.float16)).view(np.uint32)
        return pairs.reshape(2, warps, 32)
    typed = x.transpose(1, 4, 0, 2, 3).astype(np.float32 if kind == "f32" else np.int32)
    return np.ascontiguousarray(typed).view(np.uint32).reshape(4, warps, 32)


def indices(metadata: Array, form: Form, selector: int) -> Array:
    """The places of the kept elements, [warps, 16, k/4 groups, 2], from metadata [warps, 32]."""
    warps = len(metadata)
    words = metadata.reshape(warps, 8, 4)  # w, g, t
    if form.bits == 16:
        pair = words[:, :, 2 * selector : 2 * selector + 2]  # w, g, h
        halves = np.stack([pair & 0xFFFF, pair >> 16], axis=1)  # w, row half, g, h: four groups each
        shifts = np.arange(0, 16, 2, dtype=np.uint32)
    else:
        halves = words.reshape(warps, 8, 2, 2).transpose(0, 3, 1, 2)  # t = 2 h + row half; eight groups each
        shifts = np.arange(0, 32, 2, dtype=np.uint32)
    return (halves[..., None] >> shifts & 3).reshape(warps, 16, form.k // 4, 2)


def multiply(
    form: Form, a: Array, b: Array, c: Array, metadata: Array | None, selector: int, active: Array | None, text: str
) -> Array:
    """D [R, warps, 32] from registers [R, warps, 32]; `active` [warps] says whose metadata must be legal."""
    left, right = matrix_a(a, form.a), matrix_b(b, form.b)
    total = matrix_c(c, form.accumulator)
    if metadata is None:
        product = left @ right
    else:
        place = indices(metadata, form, selector)
        illegal = place[..., 0] >= place[..., 1]
        if active is not None:
            illegal &= active[:, None, None]
        if illegal.any():
            w, row, group = (int(x[0]) for x in np.nonzero(illegal))
            raise PtxError(f"metadata {place[w, row, group].tolist()} of row {row}, group {group}, warp {w}: {text}")
        product = sparse_product(left, place, right)
    if form.accumulator == "s32":
        return registers_d(total + product.astype(np.int64), "s32")  # sums of 8-bit products are exact in float32
    return registers_d(total + product, form.accumulator)


def sparse_product(kept: Array, place: Array, right: Array) -> Array:
    """kept [w, 16, k/2] at `place` [w, 16, k/4, 2], times right [w, k, 8], of which it meets no more than that."""
    warps, rows, groups, _ = place.shape
    values = kept.reshape(warps, rows, groups, 2, 1)
    if np.isfinite(right).all():
        spread = np.where(place[..., None] == np.arange(4), values, 0).sum(axis=3, dtype=np.float32)
        return spread.reshape(warps, rows, groups * 4) @ right
    column = (np.arange(groups)[:, None] * 4 + place).reshape(warps, rows * groups * 2, 1)
    met = np.take_along_axis(right, column.astype(np.int64), axis=1).reshape(warps, rows, groups * 2, 8)
    return (kept[..., None] * met).sum(axis=2)
