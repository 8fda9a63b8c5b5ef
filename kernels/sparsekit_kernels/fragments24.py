"""2:4 weights as the operand fragments of `mma.sp`, bit by bit: what the tensor cores read, in the order they read it.

The canonical layout (`layout24`, `quant`) is for disks and for people. For the GPU it is reordered once, when a model
is packed, so that every load of a kernel is 16 contiguous bytes a lane and nothing moves between lanes. Both directions
are exact: `restore` gives back the very bytes `prepare` was given.

Tiles. W is cut into row tiles of 16 rows and steps of 256 columns; N is padded to 16 and K to 256 with empty groups.
One instruction, `mma.sp.m16n8k32`, takes a row tile and 32 columns, eight groups of four, of which each keeps two. With

    g = lane >> 2,   t = lane & 3

a lane holds four registers, each with the two slots of one group (slot 0 in the lower half):

    register   0               1                   2               3
    row        g               g + 8               g               g + 8
    group      t               t                   t + 4           t + 4

Fragments, int32 [N/16, K/256, chunks, 32 lanes, 4 words]: a chunk is one 16-byte load of each lane.

    format         chunks   columns in a chunk   word w of a lane
    semi24         8        32                   register w
    semi24_fp8     4        64                   registers 2(w & 1), 2(w & 1) + 1 of the 32 columns w >> 1: its bytes,
    semi24_int8                                  low to high, are slot 0 of both registers, then slot 1 of both
    semi24_int4    2        128                  the four registers of the 32 columns w: nibble r is slot 0 of register
                                                 r, nibble 4 + r its slot 1, stored as q + 8, 1 to 15

The order inside a word is the one that makes the way back to 16 bits short. Every second byte (every fourth nibble) of
a word belongs to one register, so a register's two slots are already 16 bits apart: a shift and a mask put them in
place, and the mask is joined by the bits of a number whose unit in the last place is one. For int4

    bf16:  (word >> 4r & 0x000f000f) | 0x43004300 = 128 + u in both halves;    minus 136 = u - 8 = q
    fp16:  (word >> 4r & 0x000f000f) | 0x64006400 = 1024 + u;                  minus 1032 = q

(one `lop3`, one packed subtraction), and the bytes of int8 and fp8 likewise; see `spmm24_mma`.

Metadata, int32 [N/16, K/256, 32 lanes, 4 words]: word j covers the columns 64j .. 64j + 63 of the step. The instruction
takes it from two lanes of each quad, and its selector F says from which two. With t = 2F + h,

    bits  0..15: row g,      groups 4h .. 4h + 3 of the 32 columns 2j + F of the step, the first in the lowest nibble
    bits 16..31: row g + 8,  the same groups

so that one 16-byte load of a lane serves eight instructions: selector 0, then 1, of each word.

Eight bits on m16n8k64. int8 weights times int8 x go through the instruction of 64 columns, which wants of a lane two
neighbouring groups, t' and t' + 1, where it has the groups t, t + 4, t + 8 and t + 12 of a chunk. The columns of a
product may be taken in any order, so the instruction's group 8 F + 2 a + b is group 8 F + a + 4 b of the chunk: x is
read in that order, and

    register 0, 1   row g, g + 8: bytes 0 2, 1 3 of words 0 and 1        2, 3   the same of words 2 and 3
    metadata        row g in even lanes, g + 8 in odd ones, columns 32 F … 32 F + 31, F = t >> 1: the nibbles of the
                    quad's lanes 2 F and 2 F + 1 in turn, from their lower or upper halves

a byte permutation a register, and a lane that loads the metadata of both (see `mma_sp_ptx`).

Scales of semi24_int4, int32 [N/16, K/256, 2, 8]: word (b, g) holds the bfloat16 scales of columns 128b .. 128b + 127 of
the step, row g in the lower and row g + 8 in the upper half. The other formats' scales are by row and stay as they are.

Gated. For SiLU(gate) * up the two rows that meet should sit in one lane. With `gated` the rows 0 .. N/2 - 1 of W are
the gate and the others up; row tile i then holds gate rows 8i .. 8i + 7 as rows 0 .. 7, and those of up as 8 .. 15.

Bytes: padding aside, exactly the canonical ones (9, 5, 5 and 3.125 bits per dense weight).
Source for positions: PTX ISA, "Matrix Fragments for sparse mma.m16n8k32" and "Sparse matrix storage".
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

FORMATS = ("semi24", "semi24_fp8", "semi24_int8", "semi24_int4")
TILE_N = 16  # rows of one mma.sp
STEP_K = 256  # columns whose metadata is 16 bytes a lane
CHUNKS = {"semi24": 8, "semi24_fp8": 4, "semi24_int8": 4, "semi24_int4": 2}  # 16-byte loads of a lane per step

EMPTY = 0xEE  # the metadata of two groups that keep nothing


def num_tiles(N: int, gated: bool = False) -> int:
    """Return how many row tiles hold N rows."""
    return -(-(N // 2) // 8) if gated else -(-N // TILE_N)


def num_steps(K: int) -> int:
    """Return how many steps of 256 columns hold K columns."""
    return -(-K // STEP_K)


def prepare(values: Tensor, meta: Tensor, format: str, gated: bool = False) -> tuple[Tensor, Tensor]:
    """Return (fragments int32 [T, S, chunks, 32, 4], metadata int32 [T, S, 32, 4]) of a canonical weight.

    Args:
        values: [N, Kp/2] in 16 bits, float8_e4m3fn or int8, or uint8 [N, Kp/4] for semi24_int4.
        meta: uint8 [N, Kp/8].
        format: one of `FORMATS`.
        gated: the first half of the rows is the gate of the second (even N).
    Raises:
        ValueError: the tensors are not a weight in that format.
    """
    _check(values, meta, format, gated)
    N, groups = meta.shape[0], meta.shape[1] * 2
    T, S = num_tiles(N, gated), num_steps(groups * 4)
    per_group = values.shape[1] // groups if groups else 1  # elements a group takes
    rows = _tiled(pad(values.view(_integer(values)), (0, S * 64 * per_group - values.shape[1])), gated)
    # Dimensions: T row tile, row: its half, g: row in it; S step, chunk, 32: columns, t4: half of the groups, t, slot.
    if format == "semi24":
        words = rows.view(T, 2, 8, S, 8, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)  # T S chunk g t: t4 row slot
    elif format == "semi24_int4":
        nibbles = (rows ^ 0x88).view(T, 2, 8, S, 2, 4, 2, 4).permute(0, 3, 4, 2, 7, 5, 6, 1)  # T S chunk g t: 32 t4 row
        low, high = nibbles & 15, nibbles >> 4
        words = torch.stack([low[..., 0] | low[..., 1] << 4, high[..., 0] | high[..., 1] << 4], -2)  # … 32 slot t4
    else:
        words = rows.view(T, 2, 8, S, 4, 2, 2, 4, 2).permute(0, 3, 4, 2, 7, 5, 6, 8, 1)  # T S chunk g t: 32 t4 slot row
    fragments = words.reshape(-1).view(torch.int32).view(T, S, CHUNKS[format], 32, 4)
    nibbles = _tiled(pad(meta, (0, S * 32 - meta.shape[1]), value=EMPTY), gated, EMPTY)
    quads = nibbles.view(torch.int16).view(T, 2, 8, S, 4, 2, 2)  # T row g S j F h
    metadata = quads.permute(0, 3, 2, 5, 6, 4, 1).reshape(-1).view(torch.int32).view(T, S, 32, 4)
    return fragments, metadata


def restore(
    fragments: Tensor, metadata: Tensor, format: str, N: int, K: int, dtype: torch.dtype, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (values, meta) in the canonical layout, bit for bit what `prepare` was given.

    Args:
        dtype: of the values: 16-bit for semi24, float8_e4m3fn, int8, or uint8 for semi24_int4.
    """
    T, S, bytes_of_meta = num_tiles(N, gated), num_steps(K), -(-K // 8)
    check_fragments(fragments, metadata, format, N, K, gated)
    if format == "semi24":
        slots = fragments.view(torch.int16).view(T, S, 8, 8, 4, 2, 2, 2)  # T S chunk g t t4 row slot
        values = slots.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(T, 2, 8, S * 128)
        columns = bytes_of_meta * 4
    elif format == "semi24_int4":
        words = fragments.view(torch.uint8).view(T, S, 2, 8, 4, 4, 2, 2) ^ 0x88  # T S chunk g t 32 slot t4
        low, high = words[..., 0, :], words[..., 1, :]
        bytes_ = torch.stack([low & 15 | (high & 15) << 4, low >> 4 | high & 0xF0], -1)  # … 32 t4 row
        values = bytes_.permute(0, 7, 3, 1, 2, 5, 6, 4).reshape(T, 2, 8, S * 64)
        columns = bytes_of_meta * 2
    else:
        slots = fragments.view(torch.uint8).view(T, S, 4, 8, 4, 2, 2, 2, 2)  # T S chunk g t 32 t4 slot row
        values = slots.permute(0, 8, 3, 1, 2, 5, 6, 4, 7).reshape(T, 2, 8, S * 128)
        columns = bytes_of_meta * 4
    quads = metadata.view(torch.int16).view(T, S, 8, 2, 2, 4, 2)  # T S g F h j row
    meta = quads.permute(0, 6, 2, 1, 5, 3, 4).reshape(-1).view(torch.uint8).view(T, 2, 8, S * 32)
    return (
        _untiled(values, N, gated)[:, :columns].contiguous().view(dtype),
        _untiled(meta, N, gated)[:, :bytes_of_meta].contiguous(),
    )


def prepare_scales(scales: Tensor, gated: bool = False) -> Tensor:
    """Return the scales of a semi24_int4 weight, bfloat16 [N, ceil(K/128)], as int32 [T, S, 2, 8]."""
    if scales.dim() != 2 or scales.dtype != torch.bfloat16:
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}: expected bfloat16 [N, ceil(K/128)]")
    T, S = num_tiles(scales.shape[0], gated), -(-scales.shape[1] // 2)
    rows = _tiled(pad(scales.view(torch.int16), (0, S * 2 - scales.shape[1])), gated)
    return rows.view(T, 2, 8, S, 2).permute(0, 3, 4, 2, 1).reshape(-1).view(torch.int32).view(T, S, 2, 8)


def restore_scales(scales: Tensor, N: int, K: int, gated: bool = False) -> Tensor:
    """Return the scales that `prepare_scales` was given, bfloat16 [N, ceil(K/128)]."""
    T, S = num_tiles(N, gated), num_steps(K)
    rows = scales.view(torch.int16).view(T, S, 2, 8, 2).permute(0, 4, 3, 1, 2).reshape(T, 2, 8, S * 2)
    return _untiled(rows, N, gated)[:, : -(-K // 128)].contiguous().view(torch.bfloat16)


def check_fragments(
    fragments: Tensor, metadata: Tensor, format: str, N: int, K: int, gated: bool = False
) -> None:  # fmt: skip
    """Raise ValueError unless these are the fragments and metadata of a weight [N, K], as the kernels address them.

    K is known to them in steps of 256 columns only: whether it is that of the weight, the caller vouches for.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} has no fragments: one of {', '.join(FORMATS)}")
    T, S = num_tiles(N, gated), num_steps(K)
    if gated and N % 2:
        raise ValueError(f"N={N}: gated weights have as many gate as up rows")
    expected = {"fragments": (T, S, CHUNKS[format], 32, 4), "metadata": (T, S, 32, 4)}
    for name, tensor in (("fragments", fragments), ("metadata", metadata)):
        if tensor.shape != expected[name] or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{_described(name, tensor)} are not W [{N}, {K}] in {format}: "
                f"expected contiguous int32 {expected[name]}, from prepare()"
            )
    if metadata.device != fragments.device:
        raise ValueError(f"metadata is on {metadata.device}, fragments on {fragments.device}: move one of them")


def check_scales(scales: Tensor | None, format: str, N: int, K: int, gated: bool = False) -> None:
    """Raise ValueError unless these are the scales that kernels on fragments take for a weight [N, K]."""
    if format == "semi24":
        if scales is not None:
            raise ValueError("semi24 has no scales: leave them out")
        return
    of_groups = format == "semi24_int4"
    shape = (num_tiles(N, gated), num_steps(K), 2, 8) if of_groups else (N,)
    dtype, origin = (torch.int32, ", from prepare_scales()") if of_groups else (torch.float32, "")
    if scales is None:
        raise ValueError(f"{format} needs scales: pass contiguous {dtype} {shape}{origin}")
    if scales.shape != shape or scales.dtype != dtype or not scales.is_contiguous():
        raise ValueError(f"{_described('scales', scales)}: expected contiguous {dtype} {shape}{origin}")


def _described(name: str, tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}{layout}"


def _integer(values: Tensor) -> torch.dtype:
    return torch.int16 if values.element_size() == 2 else torch.uint8


def _tiled(rows: Tensor, gated: bool, fill: int = 0) -> Tensor:
    """[N, C] as [T, 2, 8, C] contiguous: tile, upper or lower half, row in the half; missing rows are `fill`."""
    N, C = rows.shape
    T = num_tiles(N, gated)
    if gated:
        halves = pad(rows.view(2, N // 2, C), (0, 0, 0, T * 8 - N // 2), value=fill)
        return halves.view(2, T, 8, C).transpose(0, 1).contiguous()
    return pad(rows, (0, 0, 0, T * TILE_N - N), value=fill).view(T, 2, 8, C).contiguous()


def _untiled(tiles: Tensor, N: int, gated: bool) -> Tensor:
    """The inverse of `_tiled`."""
    T, _, _, C = tiles.shape
    if gated:
        return tiles.transpose(0, 1).reshape(2, T * 8, C)[:, : N // 2].reshape(N, C)
    return tiles.reshape(T * TILE_N, C)[:N]


def _check(values: Tensor, meta: Tensor, format: str, gated: bool) -> None:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} has no fragments: one of {', '.join(FORMATS)}")
    dtypes: dict[str, tuple[torch.dtype, ...]] = {
        "semi24": (torch.float16, torch.bfloat16), "semi24_fp8": (torch.float8_e4m3fn,),
        "semi24_int8": (torch.int8,), "semi24_int4": (torch.uint8,),
    }  # fmt: skip
    if values.dtype not in dtypes[format] or meta.dtype != torch.uint8:
        expected = " or ".join(map(str, dtypes[format]))
        raise ValueError(f"{format}: values are {values.dtype}, meta {meta.dtype}: expected {expected}; torch.uint8")
    per_byte = 2 if format == "semi24_int4" else 4  # elements of values for one byte of meta
    if values.dim() != 2 or meta.dim() != 2 or values.shape != (meta.shape[0], meta.shape[1] * per_byte):
        found = f"values {tuple(values.shape)} and meta {tuple(meta.shape)}"
        raise ValueError(f"{format}: {found} do not belong together: expected [N, {per_byte} * Kp/8] and [N, Kp/8]")
    if gated and meta.shape[0] % 2:
        raise ValueError(f"gated needs as many gate as up rows, W has {meta.shape[0]} rows: stack [gate; up]")
