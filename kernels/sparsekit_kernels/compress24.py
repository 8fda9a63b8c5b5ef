"""Packing on the GPU: dense to canonical 2:4 in one pass, and the best two of four for training.

`compress24` writes what `layout24.compress24` writes, bit for bit; `search24` prunes to 2:4 on the way and writes what
`layout24.compress24` would of the pruned weight. Both read the dense weight once, with 16-byte loads where its rows are
aligned, and write 9/16 of its bytes (17/32 at 32 bits); nothing else goes through memory. Not yet measured.

All is done on the bits of the values, as integers: NaN keep their payload, denormals are not flushed, and -0.0 is the
zero that the layout says it is. With b_i = (value i of a group is not zero) the filler rule of `layout24` becomes

    idx0 = 0 if b_0, else 1 if b_1, else 2            (the first non-zero, or 2)
    idx1 = 1 if b_0 b_1, else 2 if (b_0 + b_1) b_2, else 3    (the last of two non-zeros, or 3)

and each slot holds the value at its index. For scores, floats are compared as the integers that have their order:
s for s >= 0 and the ones' complement of |s| below; both zeros are 0. NaN lie beyond the infinities, so even they have a
rank and no group ever keeps three.
"""

# What Triton compiles takes Triton's values, which have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit_kernels.layout24 import padded_features
from sparsekit_kernels.target import why_not

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INFINITY_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
# Each thread has four 16-byte loads in flight and stores two times 16 bytes of packed values. In the machine code of
# sm_90 that is 78 instructions a group of bf16 from Triton 3.7, 108 from 3.6 (half the tile: 98 from 3.7), where 84 are
# what an H200 issues in the time that the group's 12.5 bytes take at 4.3 TB/s (arithmetic, not measured).
LAUNCH = {16: {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4}, 32: {"BLOCK_N": 4, "BLOCK_K": 512, "num_warps": 4}}


@triton.jit
def _load_groups(ptr, n, k, stride_n, stride_k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The four planes of a tile, each [BN, BK/4], as int32 of the bits; zeros beyond the weight."""
    mask = (n < N)[:, None] & (k < K)[None, :]
    bits = tl.load(ptr + n[:, None] * stride_n + k[None, :] * stride_k, mask=mask, other=0).to(tl.int32)
    even, odd = tl.split(tl.reshape(bits, (BLOCK_N, BLOCK_K // 4, 2, 2)))  # the last axis is the parity of k
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    return p0, p1, p2, p3


@triton.jit
def _interleave(p0, p1, p2, p3, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The inverse of the split into planes: [BN, BK]."""
    return tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (BLOCK_N, BLOCK_K))


@triton.jit
def _ordered(bits, ABS: tl.constexpr):
    """Integers in the order of the floats whose bits these are, sign-extended to 32."""
    return tl.where((bits & ABS) == 0, 0, bits ^ (bits >> 31 & ABS))


@triton.jit
def _add_count(count_ptr, flags, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """Add the number of flags [BN, BG] that are set to a counter; nothing is written where there are none."""
    count = tl.sum(tl.reshape(flags.to(tl.int32), (BLOCK_N * BLOCK_G,)), axis=0)
    tl.atomic_add(count_ptr, count, mask=count > 0, sem="relaxed")


@triton.jit
def _store_packed(
    w0, w1, w2, w3, values_ptr, meta_ptr, n, tile, N, G,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Encode and store groups with at most two non-zeros; w are their bits as int32, zeros of either sign as 0."""
    b0, b1, b2 = w0 != 0, w1 != 0, w2 != 0
    first = tl.where(b0, w0, tl.where(b1, w1, w2))
    at1, at2 = b0 & b1, (b0 | b1) & b2
    second = tl.where(at1, w1, tl.where(at2, w2, w3))
    nibble = tl.where(b0, 0, tl.where(b1, 1, 2)) | tl.where(at1, 4, tl.where(at2, 8, 12))
    if BITS == 16:
        pair = first & 0xFFFF | second << 16
    else:
        pair = first.to(tl.int64) & 0xFFFFFFFF | second.to(tl.int64) << 32
    low, high = tl.split(tl.reshape(nibble, (BLOCK_N, BLOCK_G // 2, 2)))
    g = tile * BLOCK_G + tl.arange(0, BLOCK_G)
    b = tile * (BLOCK_G // 2) + tl.arange(0, BLOCK_G // 2)
    mask_n = (n < N)[:, None]
    tl.store(values_ptr + n[:, None] * G + g[None, :], pair, mask=mask_n & (g < G)[None, :])
    byte = (low | high << 4).to(tl.uint8)
    tl.store(meta_ptr + n[:, None] * (G // 2) + b[None, :], byte, mask=mask_n & (b < G // 2)[None, :])


@triton.jit
def _compress24_kernel(
    w_ptr, values_ptr, meta_ptr, broken_ptr, N, K, G, stride_n, stride_k,
    BITS: tl.constexpr, ABS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BN]
    tile = tl.program_id(1)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    w0, w1, w2, w3 = _load_groups(w_ptr, n, k, stride_n, stride_k, N, K, BLOCK_N, BLOCK_K)
    w0 = tl.where((w0 & ABS) == 0, 0, w0)
    w1 = tl.where((w1 & ABS) == 0, 0, w1)
    w2 = tl.where((w2 & ABS) == 0, 0, w2)
    w3 = tl.where((w3 & ABS) == 0, 0, w3)
    count = (w0 != 0).to(tl.int32) + (w1 != 0).to(tl.int32) + (w2 != 0).to(tl.int32) + (w3 != 0).to(tl.int32)
    _add_count(broken_ptr, count > 2, BLOCK_N, BLOCK_K // 4)
    _store_packed(w0, w1, w2, w3, values_ptr, meta_ptr, n, tile, N, G, BITS, BLOCK_N, BLOCK_K // 4)


@triton.jit
def _search24_kernel(
    w_ptr, scores_ptr, values_ptr, meta_ptr, keep_ptr, masked_ptr, nan_ptr,
    N, K, G, stride_n, stride_k, stride_sn, stride_sk,
    BITS: tl.constexpr, ABS: tl.constexpr, SCORE_ABS: tl.constexpr, SCORE_INFINITY: tl.constexpr,
    HAS_SCORES: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BN]
    tile = tl.program_id(1)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    w0, w1, w2, w3 = _load_groups(w_ptr, n, k, stride_n, stride_k, N, K, BLOCK_N, BLOCK_K)
    if HAS_SCORES:
        s0, s1, s2, s3 = _load_groups(scores_ptr, n, k, stride_sn, stride_sk, N, K, BLOCK_N, BLOCK_K)
        nan = ((s0 & SCORE_ABS) > SCORE_INFINITY).to(tl.int32) + ((s1 & SCORE_ABS) > SCORE_INFINITY).to(tl.int32)
        nan += ((s2 & SCORE_ABS) > SCORE_INFINITY).to(tl.int32) + ((s3 & SCORE_ABS) > SCORE_INFINITY).to(tl.int32)
        s0, s1, s2, s3 = (
            _ordered(s0, SCORE_ABS), _ordered(s1, SCORE_ABS), _ordered(s2, SCORE_ABS), _ordered(s3, SCORE_ABS)
        )  # fmt: skip
        # Columns beyond K lose against every score. Places 0 and 1 need no help: with 1 beyond, 0 stays anyway.
        g = tile * BLOCK_K // 4 + tl.arange(0, BLOCK_K // 4)
        s2 = tl.where((g * 4 + 2 < K)[None, :], s2, -0x80000000)
        s3 = tl.where((g * 4 + 3 < K)[None, :], s3, -0x80000000)
    else:
        # A column beyond K is a zero at a higher place than the group's own, so it loses as it stands.
        s0, s1, s2, s3 = w0 & ABS, w1 & ABS, w2 & ABS, w3 & ABS
        nan = (s0 > SCORE_INFINITY).to(tl.int32) + (s1 > SCORE_INFINITY).to(tl.int32)
        nan += (s2 > SCORE_INFINITY).to(tl.int32) + (s3 > SCORE_INFINITY).to(tl.int32)
    _add_count(nan_ptr, nan > 0, BLOCK_N, BLOCK_K // 4)
    # Each pair is compared once; among equals the lower place wins. Whoever loses less than twice stays.
    l01, l02, l03 = (s0 < s1).to(tl.int32), (s0 < s2).to(tl.int32), (s0 < s3).to(tl.int32)
    l12, l13, l23 = (s1 < s2).to(tl.int32), (s1 < s3).to(tl.int32), (s2 < s3).to(tl.int32)
    keep0 = l01 + l02 + l03 < 2
    keep1 = l12 + l13 - l01 < 1
    keep2 = l23 - l02 - l12 < 0
    keep3 = l03 + l13 + l23 > 1
    if KEEP:
        keep = _interleave(keep0, keep1, keep2, keep3, BLOCK_N, BLOCK_K)
        mask = (n < N)[:, None] & (k < K)[None, :]
        tl.store(keep_ptr + n[:, None] * K + k[None, :], keep.to(tl.int8), mask=mask)
    w0, w1, w2, w3 = (
        tl.where(keep0, w0, 0), tl.where(keep1, w1, 0), tl.where(keep2, w2, 0), tl.where(keep3, w3, 0)
    )  # fmt: skip
    if MASKED:
        masked = _interleave(w0, w1, w2, w3, BLOCK_N, BLOCK_K)
        mask = (n < N)[:, None] & (k < K)[None, :]
        tl.store(masked_ptr + n[:, None] * K + k[None, :], masked.to(masked_ptr.dtype.element_ty), mask=mask)
    w0 = tl.where((w0 & ABS) == 0, 0, w0)
    w1 = tl.where((w1 & ABS) == 0, 0, w1)
    w2 = tl.where((w2 & ABS) == 0, 0, w2)
    w3 = tl.where((w3 & ABS) == 0, 0, w3)
    _store_packed(w0, w1, w2, w3, values_ptr, meta_ptr, n, tile, N, G, BITS, BLOCK_N, BLOCK_K // 4)


class Searched24(NamedTuple):
    """What `search24` found, canonical as `layout24.compress24` has it."""

    values: Tensor  # [N, Kp/2]
    meta: Tensor  # uint8 [N, Kp/8]
    keep: Tensor | None  # boolean [N, K], True = kept
    masked: Tensor | None  # [N, K], the weight with zeros where it is not kept


def compress24(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values [N, Kp/2], meta [N, Kp/8]) of a weight that obeys 2:4, bit for bit as `layout24.compress24`.

    Args:
        w_NK: fp16, bf16 or fp32; any N and K, any strides.
    Raises:
        ValueError: `w_NK` is not such a matrix, or some group has more than two non-zeros.
        RuntimeError: Triton cannot run on its device; the message says why.
    """
    _check(w_NK, "compress24")
    N, K = w_NK.shape
    values, meta = _empty_packed(w_NK)
    broken = w_NK.new_zeros(1, dtype=torch.int32)
    if meta.numel():
        bits = 8 * w_NK.element_size()
        launch = LAUNCH[bits]
        with torch.cuda.device_of(w_NK):
            _compress24_kernel[_grid(N, K, launch)](
                _bits(w_NK), _pairs(values), meta, broken, N, K, values.shape[1] // 2, *w_NK.stride(),
                BITS=bits, ABS=(1 << bits - 1) - 1, **launch,
            )  # fmt: skip
    if found := int(broken):
        raise ValueError(f"{found} groups of four have more than two non-zeros: prune the weight to 2:4 first")
    return values, meta


def search24(
    w_NK: Tensor,
    scores_NK: Tensor | None = None,
    *,
    keep: bool = False,
    masked: bool = False,
    check: bool = True,
) -> Searched24:
    """Return the weight pruned to the best two of each four, packed, in one pass over it.

    The entries kept are those of `Pattern.project`: the two highest scores of each group, ties to the lower index.

    Args:
        w_NK: fp16, bf16 or fp32; any N and K, any strides.
        scores_NK: any floats of the same shape, higher is kept first; None for |w|.
        keep: also return which entries are kept. Two of each group are, even where a kept weight is zero.
        masked: also return the pruned weight, dense and contiguous.
        check: refuse NaN among the scores. That waits for the GPU; without it nothing does, so that a CUDA graph can
            capture the call, and NaN rank above infinity (scores: negative NaN below -infinity).
    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the scores hold NaN and `check` is set.
        RuntimeError: Triton cannot run on its device; the message says why.
    """
    _check(w_NK, "search24")
    scores = _checked_scores(scores_NK, w_NK)
    N, K = w_NK.shape
    values, meta = _empty_packed(w_NK)
    kept = torch.empty(N, K, dtype=torch.bool, device=w_NK.device) if keep else None
    pruned = torch.empty(N, K, dtype=w_NK.dtype, device=w_NK.device) if masked else None
    num_nan = w_NK.new_zeros(1, dtype=torch.int32)
    if meta.numel():
        bits, score_bits = 8 * w_NK.element_size(), 8 * scores.element_size()
        launch = LAUNCH[max(bits, score_bits)]
        with torch.cuda.device_of(w_NK):
            _search24_kernel[_grid(N, K, launch)](
                _bits(w_NK), _bits(scores), _pairs(values), meta,
                meta if kept is None else kept.view(torch.int8), meta if pruned is None else _bits(pruned), num_nan,
                N, K, values.shape[1] // 2, *w_NK.stride(), *scores.stride(),
                BITS=bits, ABS=(1 << bits - 1) - 1,
                SCORE_ABS=(1 << score_bits - 1) - 1, SCORE_INFINITY=INFINITY_BITS[scores.dtype],
                HAS_SCORES=scores_NK is not None, KEEP=keep, MASKED=masked, **launch,
            )  # fmt: skip
    if check and int(num_nan):
        raise ValueError("scores hold NaN, so there is no largest: mend the weights or the activations first")
    return Searched24(values, meta, kept, pruned)


def _check(w_NK: Tensor, name: str) -> None:
    reason = why_not(w_NK.device)
    if reason is not None:
        raise RuntimeError(f"{name} cannot run here: {reason}")
    if w_NK.dim() != 2:
        raise ValueError(f"{name} takes a matrix [N, K], got shape {tuple(w_NK.shape)}")
    if w_NK.dtype not in DTYPES:
        raise ValueError(f"{name} packs float16, bfloat16 and float32, the weight is {w_NK.dtype}: convert it first")


def _checked_scores(scores_NK: Tensor | None, w_NK: Tensor) -> Tensor:
    """The scores in one of `DTYPES`; the weight itself where there are none."""
    if scores_NK is None:
        return w_NK
    if scores_NK.shape != w_NK.shape or scores_NK.device != w_NK.device or not scores_NK.is_floating_point():
        raise ValueError(
            f"scores are {scores_NK.dtype} {tuple(scores_NK.shape)} on {scores_NK.device}: "
            f"pass floats {tuple(w_NK.shape)} on {w_NK.device}, one for each weight"
        )
    return scores_NK if scores_NK.dtype in DTYPES else scores_NK.float()


def _empty_packed(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    N, Kp = w_NK.shape[0], padded_features(w_NK.shape[1])
    return w_NK.new_empty(N, Kp // 2), w_NK.new_empty(N, Kp // 8, dtype=torch.uint8)


def _grid(N: int, K: int, launch: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(N, launch["BLOCK_N"]), triton.cdiv(padded_features(K), launch["BLOCK_K"])


def _bits(x: Tensor) -> Tensor:
    return x.detach().view(torch.int32 if x.element_size() == 4 else torch.int16)


def _pairs(values: Tensor) -> Tensor:
    """The two slots of each group as one integer [N, Kp/4], the first in the low bits."""
    return values.view(torch.int64 if values.element_size() == 4 else torch.int32)
