"""y = x @ W.T with W kept 2:4, on the sparse tensor cores of sm_80 and newer, for few tokens.

x [M, K] and y [M, N] are row-major, W lies in fragments (`fragments24`). W is the side of `mma.sp` that is sparse and
has 16 rows, the tokens are its other side, eight to an instruction: padded there, in registers, and nowhere in memory.
The weight is never expanded. A warp streams its fragments with 16-byte loads, once, and a group of four dense weights
costs a few instructions (`tests/kernels/test_spmm24_mma.py` counts them), so that reading the weight is what takes the
time: 9, 5, 5 or 3.125 bits for each dense weight of 16.

Who does what. A block of WARPS_N x WARPS_K warps computes WARPS_N * ROW_TILES row tiles for TOKENS tokens. The
WARPS_K warps of a row tile take its steps of 256 columns in turn, and are added at the end, in a fixed order. Tokens
of one step are loaded once for ROW_TILES row tiles and by WARPS_N warps, from L1. With SPLIT_K > 1 the steps are also
dealt to SPLIT_K blocks; their sums go through a workspace and a second small kernel adds them, in a fixed order too:
the same call gives the same bits every time, with no counter or atomic that a CUDA graph would have to reset.

How `mma.sp` gets in. `inline_asm_elementwise(pack=4)` gives a piece of PTX the four elements of each operand that a
lane holds in neighbouring registers, so the layout has to be known. Triton chooses layouts itself, not always the same
ones; this is Gluon, Triton's language in which they are written down. All operands of the loop are 1-D of 128 * warps
elements: element i is register i % 4 of lane i // 4 % 32 of warp i // 128, which is what a 16-byte load gives.
W is prefetched: the next chunks are loaded before the ones at hand are multiplied.

x. A load of x as it lies, row by row, touches one cache line for each of eight tokens, four times a fragment. For one
or two tokens that is nothing; for many, PACKED_X has a small kernel put x into the order of its fragments first, where
a fragment is one 16-byte load.

int8 x. int8 weights go through m16n8k64 then, twice the columns an instruction and exact sums in int32, from the same
fragments: byte permutations put them where it wants them, and a lane reads the metadata of its neighbour too. Every
generation has the instruction (IMMA.SP); only sm_100 and newer want to be told that indices ascend. Opt-in, by passing
int8 x to `spmm24_int8`: nothing here or in `prefill24` rounds activations by itself.

Gated. With `activation="silu_mul"` the weight was prepared with `gated`, and y = SiLU(x @ gate.T) * (x @ up.T).
"""

# What Triton compiles takes Triton's values, which have no Python types, and tuples of them grow.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsekit_kernels import mma_sp_ptx as ptx
from sparsekit_kernels.decompress_fragments24 import decompress as decompress
from sparsekit_kernels.fragments24 import CHUNKS, STEP_K, TILE_N, check_fragments, check_scales, num_steps
from sparsekit_kernels.launch import Kernel
from sparsekit_kernels.target import capability, num_sms, why_not_cuda

DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "s8"}
MOST_INT8_COLUMNS = (2**31 - 1) // (128 * 128) * 2  # of which a row keeps half


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.jit
def _block(first_tile, step, num_tiles, num_steps):
    """The place of (row tile, step) in the weight, an operand. Beyond the weight, its last row tile and its last step:
    such rows are not stored, and x is zero there."""
    return gl.minimum(first_tile, num_tiles - 1) * num_steps + gl.minimum(step, num_steps - 1)


@gluon.jit
def _load_metadata(
    metadata_ptr, scales_ptr, first_tile, step, num_tiles, num_steps,
    FORMAT: gl.constexpr, DTYPE: gl.constexpr, ROW_TILES: gl.constexpr,
):  # fmt: skip
    """A tuple: for each row tile the metadata of a step, for int8 x that of the even and of the odd lane of each pair;
    and then, for int4, for each row tile its scales."""
    i = gl.arange(0, first_tile.shape[0], first_tile.type.layout) % 128
    loaded = ()
    for r in gl.static_range(ROW_TILES):
        block = metadata_ptr + _block(first_tile + r, step, num_tiles, num_steps) * 128
        if DTYPE == "s8":
            even = block + gl.max_contiguous(gl.multiple_of(i - i // 4 % 2 * 4, 4), 4)
            loaded = loaded + (gl.load(even), gl.load(even + 4))
        else:
            loaded = loaded + (gl.load(block + i, eviction_policy="evict_first"),)
    if FORMAT == "semi24_int4":
        for r in gl.static_range(ROW_TILES):
            address = scales_ptr + _block(first_tile + r, step, num_tiles, num_steps) * 16 + i // 16
            scales = gl.inline_asm_elementwise(
                ptx.load_scales(), "=&r,=&r,=&r,=&r,l,l,l,l", [address.to(gl.int64, bitcast=True)],
                dtype=gl.int32, is_pure=True, pack=4,
            )  # fmt: skip
            loaded = loaded + (scales,)
    return loaded


@gluon.jit
def _load_chunks(
    fragments_ptr, first_tile, step, num_tiles, num_steps,
    FIRST: gl.constexpr, COUNT: gl.constexpr, NUM_CHUNKS: gl.constexpr, ROW_TILES: gl.constexpr,
):  # fmt: skip
    """A tuple: for each row tile COUNT chunks of a step, from chunk FIRST on."""
    i = gl.arange(0, first_tile.shape[0], first_tile.type.layout) % 128
    chunks = ()
    for r in gl.static_range(ROW_TILES):
        address = fragments_ptr + _block(first_tile + r, step, num_tiles, num_steps) * (NUM_CHUNKS * 128) + i
        for c in gl.static_range(FIRST, FIRST + COUNT):
            chunks = chunks + (gl.load(address + c * 128, eviction_policy="evict_first"),)
    return chunks


@gluon.jit
def _multiply_columns(
    sums, fragments, metadata, x_addresses, columns_left, c: gl.constexpr,
    DTYPE: gl.constexpr, ORDERED: gl.constexpr, ROW_TILES: gl.constexpr,
    PACKED_X: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """`sums` plus the product of the columns number c of a step: for each eight tokens, for each row tile."""
    new = ()
    for f in gl.static_range(len(x_addresses)):
        x = gl.inline_asm_elementwise(
            ptx.load_x(DTYPE, c, PACKED_X, MASKED), "=&r,=&r,=&r,=&r,l,l,l,l,r,r,r,r", [x_addresses[f], columns_left],
            dtype=gl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        for r in gl.static_range(ROW_TILES):
            total = gl.inline_asm_elementwise(
                ptx.mma_sp(DTYPE, ORDERED, c), ptx.mma_sp_operands(DTYPE),
                [fragments[r], x, sums[f * ROW_TILES + r], metadata[r]], dtype=sums[0].dtype, is_pure=True, pack=4,
            )  # fmt: skip
            new = new + (total,)
    return new


@gluon.jit
def _fragment(chunk, c: gl.constexpr, FORMAT: gl.constexpr, DTYPE: gl.constexpr, HAS_CVT: gl.constexpr):
    """The fragment of the columns number c of a step, from the chunk that holds it."""
    fragment = chunk
    if DTYPE == "s8":
        fragment = gl.inline_asm_elementwise(
            ptx.rows_of_8_bits(), "=&r,=&r,=&r,=&r,r,r,r,r", [chunk], dtype=gl.int32, is_pure=True, pack=4
        )
    elif FORMAT == "semi24_int4":
        fragment = gl.inline_asm_elementwise(
            ptx.from_4_bits(DTYPE, c % 4), "=&r,=&r,=&r,=&r,r,r,r,r", [chunk], dtype=gl.int32, is_pure=True, pack=4
        )
    elif FORMAT != "semi24":
        fragment = gl.inline_asm_elementwise(
            ptx.from_8_bits(FORMAT, DTYPE, HAS_CVT, c % 2), "=&r,=&r,=&r,=&r,r,r,r,r", [chunk],
            dtype=gl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    return fragment


@gluon.jit
def _metadata_of_rows(loaded, ROW_TILES: gl.constexpr):
    """For each row tile the metadata that m16n8k64 wants of a lane, from that of the two lanes of its pair."""
    i = gl.arange(0, loaded[0].shape[0], loaded[0].type.layout)
    select = gl.where(i // 4 % 2 == 0, 0x5140, 0x7362)
    metadata = ()
    for r in gl.static_range(ROW_TILES):
        words = gl.inline_asm_elementwise(
            ptx.metadata_of_8_bits(), "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
            [loaded[2 * r], loaded[2 * r + 1], select], dtype=gl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        metadata = metadata + (words,)
    return metadata


@gluon.jit
def _scale_group(sums, group, metadata, b: gl.constexpr, ROW_TILES: gl.constexpr):
    """`sums` plus `group`, the sums of 128 columns, scaled; their scales lie behind the metadata."""
    new = ()
    for s in gl.static_range(len(sums)):
        total = gl.inline_asm_elementwise(
            ptx.add_scaled(b), "=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,r,r,r,r",
            [group[s], sums[s], metadata[ROW_TILES + s % ROW_TILES]], dtype=gl.float32, is_pure=True, pack=4,
        )  # fmt: skip
        new = new + (total,)
    return new


@gluon.jit
def _step(
    sums, chunks, metadata, x_addresses, columns_left,
    fragments_ptr, metadata_ptr, scales_ptr, first_tile, step, next_step, num_tiles, num_steps,
    FORMAT: gl.constexpr, DTYPE: gl.constexpr, ORDERED: gl.constexpr, HAS_CVT: gl.constexpr,
    NUM_CHUNKS: gl.constexpr, ROW_TILES: gl.constexpr, AHEAD: gl.constexpr, PACKED_X: gl.constexpr, LAST: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """One step of 256 columns, AHEAD chunks of each row tile at a time; the chunks that follow are under way meanwhile.

    Takes the first AHEAD chunks and the metadata of its step, and returns the sums and those of `next_step`.
    """
    UNITS: gl.constexpr = 4 if DTYPE == "s8" else 8  # instructions for the columns of a step
    STEP_BYTES: gl.constexpr = UNITS * (512 if PACKED_X else 64)  # of x
    addresses = ()
    for f in gl.static_range(len(x_addresses)):
        addresses = addresses + (x_addresses[f] + step.to(gl.int64) * STEP_BYTES,)
    columns_left = columns_left - step * 256
    next_metadata = metadata
    if DTYPE == "s8":
        metadata = _metadata_of_rows(metadata, ROW_TILES)
    for first in gl.static_range(0, NUM_CHUNKS, AHEAD):
        next_chunks = chunks
        if first + AHEAD < NUM_CHUNKS:
            next_chunks = _load_chunks(
                fragments_ptr, first_tile, step, num_tiles, num_steps, first + AHEAD, AHEAD, NUM_CHUNKS, ROW_TILES
            )
        elif not LAST:
            next_metadata = _load_metadata(
                metadata_ptr, scales_ptr, first_tile, next_step, num_tiles, num_steps, FORMAT, DTYPE, ROW_TILES
            )
            next_chunks = _load_chunks(
                fragments_ptr, first_tile, next_step, num_tiles, num_steps, 0, AHEAD, NUM_CHUNKS, ROW_TILES
            )
        for c in gl.static_range(first * UNITS // NUM_CHUNKS, (first + AHEAD) * UNITS // NUM_CHUNKS):
            fragments = ()
            for r in gl.static_range(ROW_TILES):
                chunk = chunks[r * AHEAD + c * NUM_CHUNKS // UNITS - first]
                fragments = fragments + (_fragment(chunk, c, FORMAT, DTYPE, HAS_CVT),)
            if FORMAT == "semi24_int4":  # each 128 columns have their own sums, until they are scaled
                if c % 4 == 0:
                    group = ()
                    for s in gl.static_range(len(sums)):
                        group = group + (gl.zeros_like(sums[s]),)
                group = _multiply_columns(
                    group, fragments, metadata, addresses, columns_left, c, DTYPE, ORDERED, ROW_TILES, PACKED_X, MASKED
                )
                if c % 4 == 3:
                    sums = _scale_group(sums, group, metadata, c // 4, ROW_TILES)
            else:
                sums = _multiply_columns(
                    sums, fragments, metadata, addresses, columns_left, c, DTYPE, ORDERED, ROW_TILES, PACKED_X, MASKED
                )
        chunks = next_chunks
    return sums, chunks, next_metadata


@gluon.jit
def _add_warps(sums, ROW_TILES: gl.constexpr, WARPS_N: gl.constexpr, WARPS_K: gl.constexpr, LAYOUT: gl.constexpr):
    """The operands of eight tokens, added over the warps that share row tiles: [8, WARPS_N * ROW_TILES * 16]."""
    for level in gl.static_range(_log2(ROW_TILES)):  # i and i + half first, so that the last dimension counts in order
        joined = ()
        for i in gl.static_range(len(sums) // 2):
            pair = gl.join(sums[i], sums[i + len(sums) // 2])
            joined = joined + (gl.reshape(pair, (pair.shape[0], 2 << level)),)
        sums = joined
    total = gl.reshape(sums[0], (WARPS_K, WARPS_N * 128 * ROW_TILES))
    if WARPS_K > 1:
        total = gl.sum(total, axis=0)
    # lane = 4 * (row % 8) + token / 2; register = 2 * (row / 8) + token % 2
    parts = gl.permute(gl.reshape(total, (WARPS_N, 8, 4, 2, 2, ROW_TILES)), (2, 4, 0, 5, 3, 1))
    return gl.convert_layout(gl.reshape(parts, (8, WARPS_N * ROW_TILES * 16)), LAYOUT)


@gluon.jit
def _affine(
    y, n, in_range, x_scales, scales_ptr, bias_ptr,
    HAS_SCALES: gl.constexpr, HAS_X_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    if HAS_SCALES:
        y *= gl.load(scales_ptr + n, mask=in_range, other=0.0)[None, :]
    if HAS_X_SCALES:
        y *= x_scales[:, None]
    if HAS_BIAS:
        y += gl.load(bias_ptr + n, mask=in_range, other=0.0).to(gl.float32)[None, :]
    return y


@gluon.jit
def _finish(
    tile, first_token, first_row, scales_ptr, x_scales_ptr, bias_ptr, residual_ptr, y_ptr, M, N,
    HAS_SCALES: gl.constexpr, HAS_X_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales, bias, activation, residual, and the store of a tile [tokens, rows of row tiles]."""
    tile = tile.to(gl.float32)
    TOKENS: gl.constexpr = tile.shape[0]
    ROWS: gl.constexpr = tile.shape[1] // 2 if GATED else tile.shape[1]
    m = first_token + gl.arange(0, TOKENS, gl.SliceLayout(1, LAYOUT))
    features = N // 2 if GATED else N
    n = (first_row // 2 if GATED else first_row) + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    x_scales = m
    if HAS_X_SCALES:
        x_scales = gl.load(x_scales_ptr + m, mask=m < M, other=0.0)
    if GATED:
        PAIRS: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 32, 1], [1, LAYOUT.warps_per_cta[1], 1], [2, 1, 0])
        pairs = gl.permute(gl.reshape(tile, (TOKENS, ROWS // 8, 2, 8)), (0, 1, 3, 2))
        gate, up = gl.split(gl.convert_layout(gl.reshape(pairs, (TOKENS, ROWS, 2)), PAIRS))
        gate, up = gl.convert_layout(gate, LAYOUT), gl.convert_layout(up, LAYOUT)
        gate = _affine(gate, n, n < features, x_scales, scales_ptr, bias_ptr, HAS_SCALES, HAS_X_SCALES, HAS_BIAS)
        up = _affine(up, n + features, n < features, x_scales, scales_ptr, bias_ptr, HAS_SCALES, HAS_X_SCALES, HAS_BIAS)
        y = gate / (1.0 + gl.exp(-gate)) * up
    else:
        y = _affine(tile, n, n < features, x_scales, scales_ptr, bias_ptr, HAS_SCALES, HAS_X_SCALES, HAS_BIAS)
    place = m.to(gl.int64)[:, None] * features + n[None, :]
    mask = (m < M)[:, None] & (n < features)[None, :]
    if HAS_RESIDUAL:
        y += gl.load(residual_ptr + place, mask=mask, other=0.0).to(gl.float32)
    gl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


# What a launch does not depend on is not specialised: one kernel for all shapes of a config.
@gluon.jit(
    do_not_specialize=[
        "x_ptr", "scales_ptr", "x_scales_ptr", "bias_ptr", "residual_ptr", "M", "K", "stride_xm", "num_tiles",
        "num_steps",
    ]
)  # fmt: skip
def _spmm24_mma_kernel(
    x_ptr, fragments_ptr, metadata_ptr, scales_ptr, x_scales_ptr, bias_ptr, residual_ptr, out_ptr,
    M, N, K, stride_xm, num_tiles, num_steps,
    FORMAT: gl.constexpr, DTYPE: gl.constexpr, ORDERED: gl.constexpr, HAS_CVT: gl.constexpr, MASKED: gl.constexpr,
    HAS_SCALES: gl.constexpr, HAS_X_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, NUM_CHUNKS: gl.constexpr, TOKENS: gl.constexpr, ROW_TILES: gl.constexpr,
    AHEAD: gl.constexpr, WARPS_N: gl.constexpr, WARPS_K: gl.constexpr, SPLIT_K: gl.constexpr, PACKED_X: gl.constexpr,
):  # fmt: skip
    """With SPLIT_K = 1 out is y [M, features]; otherwise sums [SPLIT_K, M, num_tiles * 16], nothing applied: fp32, or
    int32 for int8 x (DTYPE "s8")."""
    WARPS: gl.constexpr = WARPS_N * WARPS_K
    OPERAND: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    i = gl.arange(0, 128 * WARPS, OPERAND)
    SUM: gl.constexpr = gl.int32 if DTYPE == "s8" else gl.float32
    UNITS: gl.constexpr = 4 if DTYPE == "s8" else 8
    token = i // 16 % 8
    if DTYPE == "s8":
        quad_column = i // 8 % 2 * 4 + i // 4 % 2 * 16
    else:
        quad_column = i // 4 % 4 * 2
    block_tile = gl.program_id(1) * (WARPS_N * ROW_TILES)
    first_tile = block_tile + i // 128 % WARPS_N * ROW_TILES
    first_step = gl.program_id(2) * WARPS_K + i // (128 * WARPS_N)
    first_token = gl.program_id(0) * TOKENS

    x_addresses = ()
    sums = ()
    for f in gl.static_range(TOKENS // 8):
        if PACKED_X:
            fragment = (first_token // 8 + f).to(gl.int64) * num_steps * (UNITS * 128) + i % 128
            x_addresses = x_addresses + ((x_ptr + fragment).to(gl.int64, bitcast=True),)
        else:
            m = gl.minimum(first_token + f * 8 + token, M - 1).to(gl.int64)  # the last token again: not stored
            x_addresses = x_addresses + ((x_ptr + m * stride_xm + quad_column).to(gl.int64, bitcast=True),)
        for _ in gl.static_range(ROW_TILES):
            sums = sums + (gl.zeros((128 * WARPS,), SUM, OPERAND),)

    step = first_step
    metadata = _load_metadata(
        metadata_ptr, scales_ptr, first_tile, step, num_tiles, num_steps, FORMAT, DTYPE, ROW_TILES
    )
    chunks = _load_chunks(fragments_ptr, first_tile, step, num_tiles, num_steps, 0, AHEAD, NUM_CHUNKS, ROW_TILES)
    for _ in range(1, (num_steps + WARPS_K * SPLIT_K - 1) // (WARPS_K * SPLIT_K)):
        next_step = step + WARPS_K * SPLIT_K
        sums, chunks, metadata = _step(
            sums, chunks, metadata, x_addresses, K - quad_column,
            fragments_ptr, metadata_ptr, scales_ptr, first_tile, step, next_step, num_tiles, num_steps,
            FORMAT, DTYPE, ORDERED, HAS_CVT, NUM_CHUNKS, ROW_TILES, AHEAD, PACKED_X, False, False,
        )  # fmt: skip
        step = next_step
    sums, chunks, metadata = _step(
        sums, chunks, metadata, x_addresses, K - quad_column,
        fragments_ptr, metadata_ptr, scales_ptr, first_tile, step, step, num_tiles, num_steps,
        FORMAT, DTYPE, ORDERED, HAS_CVT, NUM_CHUNKS, ROW_TILES, AHEAD, PACKED_X, True, MASKED,
    )  # fmt: skip

    TILE: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    for f in gl.static_range(TOKENS // 8):
        mine = ()
        for r in gl.static_range(ROW_TILES):
            mine = mine + (sums[f * ROW_TILES + r],)
        tile = _add_warps(mine, ROW_TILES, WARPS_N, WARPS_K, TILE)
        if SPLIT_K == 1:
            _finish(
                tile, first_token + f * 8, block_tile * 16, scales_ptr, x_scales_ptr, bias_ptr, residual_ptr, out_ptr,
                M, N, HAS_SCALES, HAS_X_SCALES, HAS_BIAS, GATED, HAS_RESIDUAL, TILE,
            )  # fmt: skip
        else:
            m = first_token + f * 8 + gl.arange(0, 8, gl.SliceLayout(1, TILE))
            row = block_tile * 16 + gl.arange(0, WARPS_N * ROW_TILES * 16, gl.SliceLayout(0, TILE))
            place = (gl.program_id(2).to(gl.int64) * M + m)[:, None] * (num_tiles * 16) + row[None, :]
            gl.store(out_ptr + place, tile, mask=(m < M)[:, None] & (row < num_tiles * 16)[None, :])


@gluon.jit(do_not_specialize=["x_ptr", "M", "K", "stride_xm"])
def _pack_x_kernel(x_ptr, packed_ptr, M, K, stride_xm, UNITS: gl.constexpr):
    """x as fragments int32 [tokens / 8, steps, UNITS, 32 lanes, 4], zeros beyond it; a block packs eight tokens' step.

    UNITS, the fragments of a step, are 8, or 4 of int8."""
    OPERAND: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    i = gl.arange(0, UNITS * 128, OPERAND)
    m = gl.program_id(0) * 8 + i // 16 % 8
    if UNITS == 4:
        k = i // 128 * 64 + i % 4 // 2 * 32 + i % 2 * 8 + i // 8 % 2 * 4 + i // 4 % 2 * 16
    else:
        k = i // 128 * 32 + i % 4 * 8 + i // 4 % 4 * 2
    k += gl.program_id(1) * 256
    address = (x_ptr + m.to(gl.int64) * stride_xm + k).to(gl.pointer_type(gl.int32), bitcast=True)
    words = gl.load(address, mask=(m < M) & (k < K), other=0)
    if UNITS == 4:  # a last word may have bytes beyond the row
        beyond = 8 * gl.minimum(gl.maximum(k + 4 - K, 0), 3)
        words = (words.to(gl.uint32, bitcast=True) << beyond >> beyond).to(gl.int32, bitcast=True)
    block = gl.program_id(0).to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
    gl.store(packed_ptr + block * (UNITS * 128) + i, words)


@gluon.jit(do_not_specialize=["scales_ptr", "x_scales_ptr", "bias_ptr", "residual_ptr", "M", "num_tiles"])
def _add_splits_kernel(
    sums_ptr, scales_ptr, x_scales_ptr, bias_ptr, residual_ptr, y_ptr, M, N, num_tiles,
    HAS_SCALES: gl.constexpr, HAS_X_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, SPLIT_K: gl.constexpr,
):  # fmt: skip
    """y from the sums [SPLIT_K, M, num_tiles * 16] of `_spmm24_mma_kernel`; a block takes 8 tokens and 128 rows."""
    TILE: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    first_token, first_row = gl.program_id(0) * 8, gl.program_id(1) * 128
    m = first_token + gl.arange(0, 8, gl.SliceLayout(1, TILE))
    row = first_row + gl.arange(0, 128, gl.SliceLayout(0, TILE))
    mask = (m < M)[:, None] & (row < num_tiles * 16)[None, :]
    place = m.to(gl.int64)[:, None] * (num_tiles * 16) + row[None, :]
    tile = gl.zeros((8, 128), sums_ptr.dtype.element_ty, TILE)
    for _ in gl.static_range(SPLIT_K):
        tile += gl.load(sums_ptr + place, mask=mask, other=0)
        place += M.to(gl.int64) * (num_tiles * 16)
    _finish(
        tile, first_token, first_row, scales_ptr, x_scales_ptr, bias_ptr, residual_ptr, y_ptr, M, N,
        HAS_SCALES, HAS_X_SCALES, HAS_BIAS, GATED, HAS_RESIDUAL, TILE,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """One way to launch `_spmm24_mma_kernel`; every number is a power of two.

    Attributes:
        TOKENS: of a block, 8 or more.
        ROW_TILES: of a warp, 16 rows each.
        AHEAD: chunks of each row tile that are loaded while the ones before are multiplied.
        WARPS_N, WARPS_K: of a block; the former take different row tiles, the latter different steps of K.
        SPLIT_K: blocks that share row tiles.
        PACKED_X: x is put into the order of its fragments first, by a kernel of its own.
    """

    TOKENS: int
    ROW_TILES: int
    AHEAD: int
    WARPS_N: int
    WARPS_K: int
    SPLIT_K: int = 1
    PACKED_X: bool = False

    def __post_init__(self) -> None:
        for name in ("TOKENS", "ROW_TILES", "AHEAD", "WARPS_N", "WARPS_K", "SPLIT_K"):
            value, least = getattr(self, name), 8 if name == "TOKENS" else 1
            if not isinstance(value, int) or value < least or value & (value - 1):
                raise ValueError(f"{name}={value!r}: expected a power of two, {least} or more")
        if self.TOKENS > 64:
            raise ValueError(f"TOKENS={self.TOKENS}: sums of more than 64 tokens have no room in registers")
        if self.WARPS_N * self.WARPS_K > 32:
            raise ValueError(f"WARPS_N={self.WARPS_N} times WARPS_K={self.WARPS_K}: a block has at most 32 warps")
        if self.PACKED_X not in (False, True):
            raise ValueError(f"PACKED_X={self.PACKED_X!r}: expected False or True")

    def check(self, format: str) -> None:
        """Raise ValueError if weights of `format` cannot be launched like this."""
        if self.AHEAD > CHUNKS[format]:
            raise ValueError(f"AHEAD={self.AHEAD}: a step of {format} has {CHUNKS[format]} chunks, take at most these")


# By format, then by the most tokens they serve. Chosen from the machine code of sm_90 so that a warp has at least four
# 16-byte loads of W under way; not yet measured. From 16 tokens on x is packed: row by row, eight rows are eight cache
# lines a load, and the loads of x would take longer than those of W.
SIXTEEN_BITS = {
    2: Config(TOKENS=8, ROW_TILES=1, AHEAD=8, WARPS_N=1, WARPS_K=8),
    8: Config(TOKENS=8, ROW_TILES=2, AHEAD=4, WARPS_N=1, WARPS_K=8),
    16: Config(TOKENS=16, ROW_TILES=2, AHEAD=4, WARPS_N=1, WARPS_K=8, PACKED_X=True),
    32: Config(TOKENS=32, ROW_TILES=2, AHEAD=2, WARPS_N=2, WARPS_K=4, PACKED_X=True),
    64: Config(TOKENS=64, ROW_TILES=2, AHEAD=4, WARPS_N=4, WARPS_K=2, PACKED_X=True),
}
EIGHT_BITS = {
    2: Config(TOKENS=8, ROW_TILES=1, AHEAD=4, WARPS_N=1, WARPS_K=8),
    8: Config(TOKENS=8, ROW_TILES=2, AHEAD=4, WARPS_N=1, WARPS_K=8),
    16: Config(TOKENS=16, ROW_TILES=2, AHEAD=2, WARPS_N=1, WARPS_K=8, PACKED_X=True),
    32: Config(TOKENS=32, ROW_TILES=2, AHEAD=1, WARPS_N=2, WARPS_K=4, PACKED_X=True),
    64: Config(TOKENS=64, ROW_TILES=2, AHEAD=2, WARPS_N=4, WARPS_K=2, PACKED_X=True),
}
FOUR_BITS = {
    8: Config(TOKENS=8, ROW_TILES=2, AHEAD=2, WARPS_N=1, WARPS_K=8),
    16: Config(TOKENS=16, ROW_TILES=2, AHEAD=2, WARPS_N=1, WARPS_K=8, PACKED_X=True),
    32: Config(TOKENS=32, ROW_TILES=2, AHEAD=2, WARPS_N=2, WARPS_K=4, PACKED_X=True),
    64: Config(TOKENS=64, ROW_TILES=1, AHEAD=2, WARPS_N=4, WARPS_K=2, PACKED_X=True),
}
CONFIGS = {
    "semi24": SIXTEEN_BITS, "semi24_fp8": EIGHT_BITS, "semi24_int8": EIGHT_BITS, "semi24_int4": FOUR_BITS
}  # fmt: skip


def pick_config(format: str, M: int, N: int, K: int, sms: int) -> Config:
    """Return the launch for M tokens of a weight [N, K] on a GPU with `sms` multiprocessors."""
    configs = CONFIGS[format]
    config = next((config for most, config in configs.items() if M <= most), configs[max(configs)])
    blocks = -(-N // (TILE_N * config.ROW_TILES * config.WARPS_N)) * -(-M // config.TOKENS)
    # Two blocks for each multiprocessor, and a step for each warp.
    split = min(2 * sms // max(blocks, 1), num_steps(K) // config.WARPS_K, 16)
    return replace(config, SPLIT_K=1 << max(split, 1).bit_length() - 1)


def candidates(format: str, M: int, N: int, K: int, sms: int) -> list[Config]:
    """Return the launches worth measuring for a shape, the one of `pick_config` first.

    Some may not compile without spilling or may need more registers than a GPU has; whoever measures finds out.
    """
    tokens = next((tokens for tokens in (8, 16, 32, 64) if M <= tokens), 64)
    most_sums = 8 if format == "semi24_int4" else 32  # operands a lane adds up in, four registers each
    found = [pick_config(format, M, N, K, sms)]
    for rows, (warps_n, warps_k), split, packed in itertools.product(
        (1, 2, 4), ((1, 4), (1, 8), (1, 16), (2, 4), (4, 2), (8, 1)), (1, 2, 4), (False, True)
    ):
        too_many_registers = rows * tokens // 8 > (2 if warps_k == 16 else most_sums)
        if too_many_registers or warps_k * split > num_steps(K) or tokens == 8 and warps_n > 1:
            continue
        ahead = max(1, min(CHUNKS[format], 8 // rows // (2 if tokens == 64 else 1)))
        found.append(
            Config(
                TOKENS=tokens, ROW_TILES=rows, AHEAD=ahead, WARPS_N=warps_n, WARPS_K=warps_k, SPLIT_K=split,
                PACKED_X=packed,
            )
        )  # fmt: skip
    return list(dict.fromkeys(found))


def spmm24(
    x: Tensor, fragments: Tensor, metadata: Tensor, N: int, bias: Tensor | None = None, *,
    activation: str | None = None, residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Return x @ W.T + bias, activated, plus residual, for a 16-bit 2:4 weight in fragments; any number of tokens.

    Fragments know neither the dtype of the weight nor K to more than steps of 256 columns: the caller vouches that both
    are those of x. A row meets x in its two kept places of every four only: inf or NaN of x in another place leaves the
    row's result alone, where a dense product has NaN (0 * inf).

    Args:
        x: [..., K], bf16 or fp16, the dtype of the weight; rows may be strided.
        fragments, metadata: of `fragments24.prepare(…, "semi24")`, contiguous as it returns them.
        N: rows of the weight.
        bias: [N]; may be strided.
        activation: None, or "silu_mul" for a weight prepared with `gated`: the result is [..., N/2].
        residual: of the shape of the result, added last.
        config: instead of the one `pick_config` finds.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, as far as the tensors tell.
        RuntimeError: the device of `x` cannot run this; the message says why.
    """
    return _spmm24("semi24", x, fragments, metadata, None, N, bias, activation, residual, config)


def spmm24_fp8(
    x: Tensor, fragments: Tensor, metadata: Tensor, scales: Tensor, N: int, bias: Tensor | None = None, *,
    activation: str | None = None, residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`spmm24` for e4m3 weights with contiguous `scales` float32 [N] of their rows, exact in the dtype of x."""
    return _spmm24("semi24_fp8", x, fragments, metadata, scales, N, bias, activation, residual, config)


def spmm24_int8(
    x: Tensor, fragments: Tensor, metadata: Tensor, scales: Tensor, N: int, bias: Tensor | None = None, *,
    activation: str | None = None, residual: Tensor | None = None, config: Config | None = None,
    x_scales: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`spmm24` for int8 weights with contiguous `scales` float32 [N] of their rows. They are exact in the dtype of x.

    int8 x, of `quantize_tokens`, runs on the integer tensor cores, from the same fragments. Sums are exact, and then
    y = sum * scales[n] * x_scales[m] + bias in float32, activated, plus residual. Rounding activations costs accuracy,
    so nothing does it unless asked: this is for callers who have checked that their model bears it.

    Args:
        x_scales: float32 [...] of the rows of int8 x.
        out_dtype: of the result, bias and residual: with int8 x bf16 (None) or fp16, else the dtype of x.
    """
    return _spmm24(
        "semi24_int8", x, fragments, metadata, scales, N, bias, activation, residual, config, x_scales, out_dtype
    )


def spmm24_int4(
    x: Tensor, fragments: Tensor, metadata: Tensor, scales: Tensor, N: int, bias: Tensor | None = None, *,
    activation: str | None = None, residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`spmm24` for int4 weights with `scales` of `fragments24.prepare_scales`, applied to fp32 sums of 128 columns."""
    return _spmm24("semi24_int4", x, fragments, metadata, scales, N, bias, activation, residual, config)


class _Launch:
    """What a call can know from dtypes, the device, the weight, and about how many tokens there are."""

    def __init__(
        self, format: str, x: Tensor, fragments: Tensor, metadata: Tensor, scales: Tensor | None, N: int,
        bias: Tensor | None, activation: str | None, residual: Tensor | None, config: Config | None,
        x_scales: Tensor | None, out_dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        out = out_dtype or (torch.bfloat16 if x.dtype == torch.int8 else x.dtype)
        _check(format, x, fragments, metadata, scales, N, bias, activation, residual, x_scales, out)
        gated = activation == "silu_mul"
        self.N, self.K, self.out_dtype, self.like_x = N, x.shape[-1], out, out == x.dtype
        self.num_tiles, self.num_steps = metadata.shape[:2]
        config = config or pick_config(format, x.numel() // self.K, N, self.K, num_sms(x.device))
        config.check(format)
        applied = {
            "HAS_SCALES": format in ("semi24_fp8", "semi24_int8"), "HAS_X_SCALES": x_scales is not None,
            "HAS_BIAS": bias is not None, "GATED": gated, "HAS_RESIDUAL": residual is not None,
        }  # fmt: skip
        in_kernel = applied if config.SPLIT_K == 1 else dict.fromkeys(applied, False)
        constants = kernel_constants(format, x.dtype, self.K, config, capability(x.device)) | in_kernel
        self.multiply = Kernel(_spmm24_mma_kernel, constants, config.WARPS_N * config.WARPS_K)
        self.blocks = -(-self.num_tiles // (config.WARPS_N * config.ROW_TILES))
        self.tokens, self.split, self.packed = config.TOKENS, config.SPLIT_K, config.PACKED_X
        self.word = 4 // x.element_size()  # elements of x that are loaded at once
        self.units, self.sum_dtype = (4, torch.int32) if x.dtype == torch.int8 else (8, torch.float32)
        self.pack_x = Kernel(_pack_x_kernel, {"UNITS": self.units}, 4)
        self.add_splits = Kernel(_add_splits_kernel, {**applied, "SPLIT_K": self.split}, 4)

    def __call__(
        self, x: Tensor, M: int, fragments: Tensor, metadata: Tensor, scales: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, x_scales: Tensor | None, y: Tensor,
    ) -> None:  # fmt: skip
        x, stride = self._rows(x, M)
        blocks_m = -(-M // self.tokens)
        if self.packed:
            tiles = blocks_m * self.tokens // 8
            rows, x = x, x.new_empty(tiles, self.num_steps, self.units * 128, dtype=torch.int32)
            self.pack_x((tiles, self.num_steps, 1), rows, x, M, self.K, stride)
        out = y if self.split == 1 else y.new_empty(self.split, M, self.num_tiles * TILE_N, dtype=self.sum_dtype)
        scales = y if scales is None else scales  # a pointer that is not read
        x_scales = y if x_scales is None else x_scales.contiguous()
        bias = y if bias is None else bias.contiguous()
        residual = y if residual is None else residual.contiguous()
        self.multiply(
            (blocks_m, self.blocks, self.split),
            x, fragments, metadata, scales, x_scales, bias, residual, out,
            M, self.N, self.K, stride, self.num_tiles, self.num_steps,
        )  # fmt: skip
        if self.split > 1:
            grid = -(-M // 8), -(-self.num_tiles // 8), 1
            self.add_splits(grid, out, scales, x_scales, bias, residual, y, M, self.N, self.num_tiles)

    def _rows(self, x: Tensor, M: int) -> tuple[Tensor, int]:
        """x as rows that begin at multiples of 4 bytes and may be read to a whole number of them; their stride."""
        K = self.K
        if x.is_contiguous():
            stride = K
        else:
            x = x.reshape(M, K)
            x = x if x.stride(1) == 1 else x.contiguous()
            stride = x.stride(0)
        missing = -K % self.word  # columns that the last load of a row has more than the row: int8 ones are cut off
        readable = not missing or x.dtype == torch.int8 and (M - 1) * stride + K + missing <= _bytes_from(x)
        if stride % self.word or x.data_ptr() % 4 or not readable:
            stride = K + missing
            padded = x.new_zeros(M, stride)
            padded[:, :K] = x.reshape(M, K)
            return padded, stride
        return (x.as_strided((M, K + missing), (stride, 1)) if missing else x), stride


def _bytes_from(x: Tensor) -> int:
    """The bytes of memory from the first element of an int8 x on."""
    return x.untyped_storage().nbytes() - int(x.storage_offset())


MOST_BLOCKS = 512  # of tokens, for which launches may differ: more than any GPU has room for at a time

_launches: dict[tuple[Any, ...], _Launch] = {}


def _tokens_like(M: int) -> int:
    """A number of tokens whose launch, the grid aside, is that of M: `pick_config` gives both the same config."""
    return 1 << (M - 1).bit_length() if 0 < M <= 64 else 64 * min(-(-M // 64), MOST_BLOCKS)


def _spmm24(
    format: str, x: Tensor, fragments: Tensor, metadata: Tensor, scales: Tensor | None, N: int, bias: Tensor | None,
    activation: str | None, residual: Tensor | None, config: Config | None,
    x_scales: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    shape = x.shape
    K = shape[-1]
    M = x.numel() // K if K else 0
    device = x.get_device()
    y_shape = (*shape[:-1], N if activation is None else N // 2)
    if residual is not None and residual.shape != y_shape:
        raise ValueError(f"residual is {tuple(residual.shape)}: expected {y_shape}")
    if x_scales is not None and x_scales.shape != shape[:-1]:
        raise ValueError(f"x_scales are {tuple(x_scales.shape)}: expected one for each row of x, {tuple(shape[:-1])}")
    # All that a launch relies on, so that none is remembered for tensors that it would misread. fragments and metadata
    # are compiled for as multiples of 16 bytes or not; the rest need not be.
    key = (
        format, _tokens_like(M), K, N, x.dtype, device, activation, config, out_dtype,
        fragments.numel(), fragments.dtype, fragments.get_device(), metadata.numel(), metadata.dtype,
        metadata.get_device(), fragments.is_contiguous() and metadata.is_contiguous(),
        (fragments.data_ptr() | metadata.data_ptr()) % 16,
        None if scales is None else (scales.shape, scales.dtype, scales.get_device(), scales.is_contiguous()),
        None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
        None if residual is None else (residual.dtype, residual.get_device()),
        None if x_scales is None else (x_scales.dtype, x_scales.get_device()),
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        launch = _launches[key] = _Launch(
            format, x, fragments, metadata, scales, N, bias, activation, residual, config, x_scales, out_dtype
        )
    # To name a dtype, or to enter a device that is the current one, takes the host as long as all of the above.
    y = x.new_empty(*y_shape) if launch.like_x else x.new_empty(y_shape, dtype=launch.out_dtype)
    if M and N:
        if device < 0 or device == torch.cuda.current_device():
            launch(x, M, fragments, metadata, scales, bias, residual, x_scales, y)
        else:
            with torch.cuda.device(device):
                launch(x, M, fragments, metadata, scales, bias, residual, x_scales, y)
    return y


def kernel_constants(
    format: str, dtype: torch.dtype, K: int, config: Config, capability: tuple[int, int]
) -> dict[str, Any]:
    """Return the constants of `_spmm24_mma_kernel` that are not about what follows the product."""
    return {
        "FORMAT": format, "DTYPE": DTYPES[dtype], "NUM_CHUNKS": CHUNKS[format],
        # From sm_100 on `mma.sp` without the promise that indices ascend is several times slower (kernels compiled for
        # sm_80 to sm_90 gain nothing from it).
        "ORDERED": capability >= (10, 0),
        "HAS_CVT": capability >= (8, 9),  # e4m3 to f16 in one instruction
        "MASKED": not config.PACKED_X and K % STEP_K > 0 or num_steps(K) % (config.WARPS_K * config.SPLIT_K) > 0,
        "TOKENS": config.TOKENS, "ROW_TILES": config.ROW_TILES, "AHEAD": config.AHEAD,
        "WARPS_N": config.WARPS_N, "WARPS_K": config.WARPS_K, "SPLIT_K": config.SPLIT_K, "PACKED_X": config.PACKED_X,
    }  # fmt: skip


def _check(
    format: str, x: Tensor, fragments: Tensor, metadata: Tensor, scales: Tensor | None, N: int, bias: Tensor | None,
    activation: str | None, residual: Tensor | None, x_scales: Tensor | None, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """All but the shapes that depend on the number of tokens."""
    reason = why_not_cuda(x.device)
    if reason is not None:
        raise RuntimeError(f"spmm24 on fragments cannot run here: {reason}")
    allowed = [dtype for dtype in DTYPES if dtype != torch.int8 or format == "semi24_int8"]
    if x.dtype not in allowed:
        raise ValueError(f"x is {x.dtype}: expected {' or '.join(map(str, allowed))}, convert it")
    K = x.shape[-1]
    if x.dtype == torch.int8:
        if x_scales is None or x_scales.dtype != torch.float32:
            found = "missing" if x_scales is None else x_scales.dtype
            raise ValueError(f"x is int8 and x_scales are {found}: pass the float32 ones of quantize_tokens()")
        if out_dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"out_dtype={out_dtype}: expected torch.bfloat16 or torch.float16")
        if K > MOST_INT8_COLUMNS:
            raise ValueError(f"K={K}: int32 holds the sums of at most {MOST_INT8_COLUMNS} columns of int8 x")
    elif x_scales is not None or out_dtype != x.dtype:
        raise ValueError(f"x_scales and out_dtype are for int8 x, x is {x.dtype}: leave them out")
    if activation not in (None, "silu_mul"):
        raise ValueError(f"activation={activation!r} is not known: None or 'silu_mul'")
    if K == 0:
        raise ValueError("x has no features: [..., K] with K > 0 is needed")
    gated = activation == "silu_mul"
    check_fragments(fragments, metadata, format, N, K, gated)
    check_scales(scales, format, N, K, gated)
    if bias is not None and (bias.shape != (N,) or bias.dtype != out_dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}: expected {out_dtype} ({N},)")
    if residual is not None and residual.dtype != out_dtype:
        raise ValueError(f"residual is {residual.dtype}: expected {out_dtype}")
    for name, tensor in (
        ("fragments", fragments), ("metadata", metadata), ("bias", bias), ("residual", residual), ("scales", scales),
        ("x_scales", x_scales),
    ):  # fmt: skip
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move one of them")
