"""From `fragments24` back to the dense weight, on the GPU and at the speed of memory, for the dense tensor cores.

Used where a weight is multiplied with so many tokens that its size no longer matters; the result is scratch.

A block takes one row tile and one step of 256 columns, 1024 groups of four, in the order of the fragments: what it
reads is contiguous, and it writes 8 bytes for each group, 32 contiguous ones for each row. The metadata and, for narrow
values, the words are read more than once, from L1.
"""

# What Triton compiles takes Triton's values, which have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit_kernels.fragments24 import CHUNKS, check_fragments, check_scales, num_steps, num_tiles
from sparsekit_kernels.target import INTERPRETED, why_not

DTYPES = (torch.float16, torch.bfloat16)


@triton.jit
def _to_16_bits(q, scale, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """q, the stored bits of a value, times scale, as 16 bits in the low half of an int64."""
    if FORMAT == "semi24_fp8":  # the bits moved to where fp16 has them; 2**8 makes up for the bias of the exponent
        half = ((q & 0x80) << 8 | (q & 0x7F) << 7).to(tl.uint16).to(tl.float16, bitcast=True)
        value = half.to(tl.float32) * 256.0
    elif FORMAT == "semi24_int8":
        value = ((q ^ 0x80) - 0x80).to(tl.float32)
    else:
        value = (q - 8).to(tl.float32)
    return (value * scale).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int64)


@triton.jit
def _decompress_kernel(
    fragments_ptr, metadata_ptr, scales_ptr, w_ptr, N, K, stride_wn,
    FORMAT: tl.constexpr, NUM_CHUNKS: tl.constexpr, GATED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """With QUADS a group is written as one int64, otherwise as four 16-bit numbers as far as the row goes."""
    tile, step = tl.program_id(0), tl.program_id(1)
    block = tile.to(tl.int64) * tl.num_programs(1) + step
    i = tl.arange(0, 1024)
    column, lane, register = i // 128, i // 4 % 32, i % 4  # 32 columns each
    g, t, lower, later = lane // 4, lane % 4, register % 2, register // 2  # row g + 8 * lower, group t + 4 * later
    if GATED:
        n = tile * 8 + g + lower * (N // 2)
        inside = tile * 8 + g < N // 2
    else:
        n = tile * 16 + g + lower * 8
        inside = n < N
    k = step * 256 + column * 32 + later * 16 + t * 4

    words_ptr = fragments_ptr + block * (NUM_CHUNKS * 128) + lane * 4
    if FORMAT == "semi24":
        word = tl.load(words_ptr + column * 128 + register)
        first, second = word & 0xFFFF, (word >> 16) & 0xFFFF
    elif FORMAT == "semi24_int4":
        word = tl.load(words_ptr + column // 4 * 128 + column % 4)
        first, second = (word >> register * 4) & 15, (word >> (register * 4 + 16)) & 15
    else:
        word = tl.load(words_ptr + column // 2 * 128 + column % 2 * 2 + later)
        first, second = (word >> lower * 8) & 0xFF, (word >> (lower * 8 + 16)) & 0xFF
    word = tl.load(metadata_ptr + block * 128 + (g * 4 + column % 2 * 2 + later) * 4 + column // 2)
    nibble = word >> (lower * 16 + t * 4)
    shift0 = ((nibble & 3) * 16).to(tl.int64)
    shift1 = ((nibble >> 2 & 3) * 16).to(tl.int64)

    if FORMAT == "semi24":
        first, second = first.to(tl.int64), second.to(tl.int64)
    else:
        if FORMAT == "semi24_int4":
            word = tl.load(scales_ptr + block * 16 + column // 4 * 8 + g)
            scale = (word >> lower * 16 << 16).to(tl.float32, bitcast=True)
        else:
            scale = tl.load(scales_ptr + n, mask=inside, other=0.0)
        first = _to_16_bits(first, scale, FORMAT, w_ptr.dtype.element_ty)
        second = _to_16_bits(second, scale, FORMAT, w_ptr.dtype.element_ty)
    group = first << shift0 | second << shift1
    address = w_ptr + n.to(tl.int64) * stride_wn + k
    if QUADS:
        tl.store(address.to(tl.pointer_type(tl.int64), bitcast=True), group, mask=inside & (k < K))
    else:
        for j in tl.static_range(4):
            value = (group >> (16 * j)).to(tl.int16).to(w_ptr.dtype.element_ty, bitcast=True)
            tl.store(address + j, value, mask=inside & (k + j < K))


def decompress(
    fragments: Tensor, metadata: Tensor, N: int, K: int, dtype: torch.dtype, *,
    format: str = "semi24", scales: Tensor | None = None, gated: bool = False, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the dense weight [N, K] in `dtype`, rows in their own order (gate before up, if `gated`).

    Args:
        fragments, metadata: of `fragments24.prepare`, contiguous as it returns them.
        dtype: bf16 or fp16; for semi24 the dtype of the values.
        scales: None for semi24, of `fragments24.prepare_scales` for semi24_int4, float32 [N] otherwise.
        out: scratch [N, K] to write to, of `dtype` and contiguous.
    Raises:
        ValueError: the tensors are not such a weight. They know K in steps of 256 only: the caller vouches for it.
        RuntimeError: Triton cannot run on their device; the message says why.
    """
    reason = why_not(fragments.device)
    if reason is not None:
        raise RuntimeError(f"decompress cannot run here: {reason}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: expected {' or '.join(map(str, DTYPES))}")
    check_fragments(fragments, metadata, format, N, K, gated)
    check_scales(scales, format, N, K, gated)
    if scales is not None and scales.device != fragments.device:
        raise ValueError(f"scales are on {scales.device}, fragments on {fragments.device}: move one of them")
    if out is None:
        out = fragments.new_empty(N, K, dtype=dtype)
    elif out.shape != (N, K) or out.dtype != dtype or not out.is_contiguous() or out.device != fragments.device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}: "
            f"expected contiguous {dtype} [{N}, {K}] on {fragments.device}"
        )
    if out.numel():
        quads = K % 4 == 0 and out.data_ptr() % 8 == 0 and not INTERPRETED
        with torch.cuda.device_of(out):
            _decompress_kernel[(num_tiles(N, gated), num_steps(K))](
                fragments, metadata, out if scales is None else scales, out, N, K, K,
                FORMAT=format, NUM_CHUNKS=CHUNKS[format], GATED=gated, QUADS=quads, num_warps=4,
            )  # fmt: skip
    return out
