"""The pieces of PTX that `spmm24_mma` is made of, as text: `mma.sp`, its operands, and the ways to 16 bits.

Every piece is for `inline_asm_elementwise(pack=4)`: $0-3 are a lane's four registers of the result, $4-7, $8-11, …
those of the operands. Layouts are in `fragments24`.

The ways to 16 bits are exact. A group of four dense weights costs a lane 2.75 instructions for int4 (2.25 for fp16 x),
3.5 (2.5) for int8 and 4.5 for e4m3, or 1.5 where `cvt` knows it. With int8 x there is no such way to go: 1.1, all told,
put values and metadata where m16n8k64 wants them.
"""

# mypy: allow-untyped-defs

import triton


@triton.constexpr_function
def mma_sp(dtype, ordered, c):
    """PTX: $0-3 = W fragment $4-7 times x fragment $8-11, plus $12-15, for the columns number c of a step, 32 or, for
    s8, 64 of them; the metadata of the step is $16-19."""
    order = "::ordered_metadata" if ordered else ""
    shape, total = ("m16n8k64", "s32") if dtype == "s8" else ("m16n8k32", "f32")
    word, selector = (c, 0) if dtype == "s8" else (c // 2, c % 2)
    return (
        f"mma.sp{order}.sync.aligned.{shape}.row.col.{total}.{dtype}.{dtype}.{total} "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, ${16 + word}, {selector};"
    )


@triton.constexpr_function
def mma_sp_operands(dtype):
    """The kinds of registers of `mma_sp`: sums are int32 for s8 and float32 otherwise."""
    total = "r" if dtype == "s8" else "f"
    return ",".join([f"={total}"] * 4 + ["r"] * 8 + [total] * 4 + ["r"] * 4)


@triton.constexpr_function
def load_x(dtype, c, packed, masked):
    """PTX: $0-3 = the x fragment of the columns number c of a step, 32 or, for s8, 64 of them.

    A quad of lanes holds one token, each lane 2 of every 8 columns, or, for s8, one of every four groups. $4 is the
    address of the lane's first columns of the step; if `masked`, $8 counts the columns of x from there on, and what
    lies beyond is zero. If `packed`, $4 is the address of the lane's 16 bytes of the step's first fragment.
    """
    if packed:
        load = f"ld.global.nc.v4.b32 {{$0,$1,$2,$3}}, [$4+{512 * c}];"
        zero = " ".join(f"mov.b32 ${r}, 0;" for r in range(4))
        return f"{{ .reg .pred p; setp.gt.s32 p, $8, 0; {zero} @p {load} }}" if masked else load
    columns = [64 * c + 32 * (r // 2) + 8 * (r % 2) if dtype == "s8" else 32 * c + 8 * r for r in range(4)]
    size = 1 if dtype == "s8" else 2
    loads = [f"ld.global.nc.b32 ${r}, [$4+{size * columns[r]}];" for r in range(4)]
    if not masked:
        return " ".join(loads)
    guarded = [f"setp.gt.s32 p, $8, {columns[r]}; mov.b32 ${r}, 0; @p {loads[r]}" for r in range(4)]
    if dtype == "s8":  # and of the last four columns those that x has; the shift of -1 ends at 32
        for r in range(4):
            guarded[r] += f" sub.s32 s, {columns[r] + 4}, $8; max.s32 s, s, 0; shl.b32 s, s, 3; "
            guarded[r] += f"shr.u32 s, -1, s; and.b32 ${r}, ${r}, s;"
    return "{ .reg .pred p; .reg .b32 s; " + " ".join(guarded) + " }"


@triton.constexpr_function
def rows_of_8_bits():
    """PTX: $0-3 = the fragment of m16n8k64 that the chunk $4-7 holds: two groups of row g, of row g + 8, and again."""
    words = [(4, 5, "0x6420"), (4, 5, "0x7531"), (6, 7, "0x6420"), (6, 7, "0x7531")]
    return " ".join(f"prmt.b32 ${r}, ${a}, ${b}, {bytes};" for r, (a, b, bytes) in enumerate(words))


@triton.constexpr_function
def metadata_of_8_bits():
    """PTX: $0-3 = the metadata that m16n8k64 wants of a lane for a step, a word for every 64 columns.

    $4-7 and $8-11 are the metadata of the even and of the odd lane of a pair, groups 0-3 and 4-7 of 32 columns, of two
    rows each. $12 selects the bytes of the lane's row, 0x5140 or 0x7362: groups 0 1 4 5 2 3 6 7 by nibbles. The second
    and third nibble of each half then change places, since a lane has groups t and t + 4 side by side.
    """
    ptx = "{ .reg .b32 s, u, v; "
    for j in range(4):
        ptx += f"prmt.b32 s, ${4 + j}, ${8 + j}, $12; shr.b32 u, s, 4; lop3.b32 u, s, u, 0x00f000f0, 0x28; "
        ptx += f"shl.b32 v, u, 4; lop3.b32 ${j}, s, u, v, 0x96; "
    return ptx + "}"


@triton.constexpr_function
def from_8_bits(format, dtype, has_cvt, tile):
    """PTX: $0-3 = the 16-bit fragment of the 32 columns `tile` (0 or 1) of the chunk $4-7, whose words hold 8 bits."""
    x2 = f"{dtype}x2"
    ptx = "{ .reg .b32 s, t, c, d; .reg .b16 low, high; "
    if format == "semi24_fp8":  # what makes up for the smaller bias of the exponent, 2**8 and 2**120; and -0
        ptx += f"mov.b32 c, {'0x5c005c00' if dtype == 'f16' else '0x7b807b80'}; mov.b32 d, 0x80008000; "
    else:  # f16: -1152; bf16: -1
        ptx += f"mov.b32 c, {'0xe480e480' if dtype == 'f16' else '0xbf80bf80'}; "
    for half in (0, 1):
        word = f"${4 + 2 * tile + half}"
        if format == "semi24_fp8" and dtype == "f16" and has_cvt:
            ptx += f"prmt.b32 t, {word}, 0, 0x3120; mov.b32 {{low, high}}, t; "
            ptx += f"cvt.rn.f16x2.e4m3x2 ${2 * half}, low; cvt.rn.f16x2.e4m3x2 ${2 * half + 1}, high; "
            continue
        for odd in (0, 1):  # bytes 0 and 2, bytes 1 and 3
            out = f"${2 * half + odd}"
            if format == "semi24_fp8":  # exponent and mantissa moved to their places, and the sign
                up, mask = (7, "0x3f803f80") if dtype == "f16" else (4, "0x07f007f0")
                ptx += f"shl.b32 t, {word}, {up}; " if not odd else f"shr.b32 t, {word}, {8 - up}; "
                ptx += f"and.b32 t, t, {mask}; shl.b32 s, {word}, {0 if odd else 8}; "
                ptx += f"lop3.b32 t, s, 0x80008000, t, 0xea; fma.rn.{x2} {out}, t, c, d; "
            elif dtype == "f16":  # the sign bit flipped below 1024: 1024 + 128 + q
                ptx += f"shr.b32 s, {word}, {8 * odd}; lop3.b32 t, s, 0x00ff00ff, 0x64806480, 0x6a; "
                ptx += f"add.rn.f16x2 {out}, t, c; "
            else:  # q = the low seven bits, minus 128 if the eighth is set: (128 + low) - (128 or 256)
                ptx += f"shr.b32 s, {word}, {8 * odd}; lop3.b32 t, s, 0x007f007f, 0x43004300, 0xea; "
                ptx += f"lop3.b32 s, s, 0x00800080, 0x43004300, 0xea; fma.rn.bf16x2 {out}, s, c, t; "
    return ptx + "}"


@triton.constexpr_function
def from_4_bits(dtype, tile):
    """PTX: $0-3 = the 16-bit fragment of the 32 columns `tile` (0 to 3) of the chunk $4-7, word `tile` of it."""
    ptx = "{ .reg .b32 s, t, c, d, e, f; "
    if dtype == "bf16":  # 128 + u, times 1, minus 136
        ptx += "mov.b32 c, 0x3f803f80; mov.b32 d, 0xc308c308; "
        for r in range(4):
            ptx += f"shr.b32 s, ${4 + tile}, {4 * r}; lop3.b32 t, s, 0x000f000f, 0x43004300, 0xea; "
            ptx += f"fma.rn.bf16x2 ${r}, t, c, d; "
        return ptx + "}"
    # 1024 + u, minus 1032; and 1024 + 16 u, by 16, minus 72: two nibbles for one shift
    ptx += "mov.b32 c, 0xe408e408; mov.b32 d, 0x2c002c00; mov.b32 e, 0xd480d480; "
    for r in (0, 2):
        ptx += f"shr.b32 s, ${4 + tile}, {4 * r}; lop3.b32 t, s, 0x000f000f, 0x64006400, 0xea; "
        ptx += f"add.rn.f16x2 ${r}, t, c; lop3.b32 t, s, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 ${r + 1}, t, d, e; "
    return ptx + "}"


@triton.constexpr_function
def load_scales():
    """PTX: $0 and $1 = the scales of the two times 128 columns of a step, of rows g and g + 8; $4 is their address."""
    return "ld.global.nc.b32 $0, [$4]; ld.global.nc.b32 $1, [$4+32]; mov.b32 $2, 0; mov.b32 $3, 0;"


@triton.constexpr_function
def add_scaled(b):
    """PTX: $0-3 = the sums $4-7 times the bf16 scales in word b of $12-15, plus $8-11."""
    return (
        f"{{ .reg .b32 low, high; shl.b32 low, ${12 + b}, 16; and.b32 high, ${12 + b}, 0xffff0000; "
        "fma.rn.f32 $0, $4, low, $8; fma.rn.f32 $1, $5, low, $9; "
        "fma.rn.f32 $2, $6, high, $10; fma.rn.f32 $3, $7, high, $11; }"
    )
