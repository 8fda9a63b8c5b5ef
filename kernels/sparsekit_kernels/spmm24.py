"""y = x @ W.T + bias with W kept 2:4 in the canonical layout: the plain, portable Triton kernel.

x [M, K] and y [M, N] are row-major; W [N, K] is stored as values [N, Kp/2] and meta [N, Kp/8] uint8, see layout24.
bf16, fp16 and fp32, any M, N and K, compute capability 8.0 and newer.

Up to 64 tokens, `_spmm24_kernel` reads each weight once, 9/16 of the dense bytes at 16 bits, and expands it in
registers. Dense tensor cores then multiply it plane by plane: with W_p[n, g] = W[n, 4g + p], x_p[m, g] = x[m, 4g + p],

    y = sum over p = 0..3 of x_p @ W_p.T

so that a group never has to be laid out as four neighbours. Above 64 tokens the weight is decompressed into scratch,
once, and multiplied by the dense library: it is then used often enough that its size no longer matters.

Splitting K gives a narrow layer enough blocks to fill the GPU. The partial sums go through a workspace and are added in
a fixed order, so the same call gives the same bits every time.
"""

# What Triton compiles takes Triton's values, which have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsekit_kernels.layout24 import GROUP, padded_features
from sparsekit_kernels.target import INTERPRETED, num_sms, why_not

DENSE_ABOVE = 64  # tokens
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _planes(pair, byte, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """The four planes of a tile, each [BN, BG], as integers of BITS bits.

    pair [BN, BG] holds the two slots of a group as one integer; byte [BN, BG/2] the nibbles of two groups.
    """
    byte = byte.to(tl.uint32)
    shift0 = tl.reshape(tl.join(byte << 4, byte) & 0x30, (BLOCK_N, BLOCK_G))  # 16 * idx0
    shift1 = tl.reshape(tl.join(byte << 2, byte >> 2) & 0x30, (BLOCK_N, BLOCK_G))  # 16 * idx1
    if BITS == 16:
        # The group as 64 bits. About a quarter fewer instructions than selecting each plane (sm_90 SASS).
        pair = pair.to(tl.uint32, bitcast=True)
        group = (pair & 0xFFFF).to(tl.uint64) << shift0.to(tl.uint64)
        group |= (pair >> 16).to(tl.uint64) << shift1.to(tl.uint64)
        w0 = group.to(tl.int16)
        w1 = (group >> 16).to(tl.int16)
        w2 = (group >> 32).to(tl.int16)
        w3 = (group >> 48).to(tl.int16)
    else:
        first, second = pair.to(tl.int32), (pair >> 32).to(tl.int32)
        w0 = tl.where(shift0 == 0, first, 0)
        w1 = tl.where(shift0 == 16, first, tl.where(shift1 == 16, second, 0))
        w2 = tl.where(shift0 == 32, first, tl.where(shift1 == 32, second, 0))
        w3 = tl.where(shift1 == 48, second, 0)
    return w0, w1, w2, w3


@triton.jit
def _load_planes(pairs_ptr, meta_ptr, n, start, N, G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """The four planes of W at rows n and groups start .. start + BLOCK_G, as integers; zeros beyond the weight."""
    g = start + tl.arange(0, BLOCK_G)
    b = start // 2 + tl.arange(0, BLOCK_G // 2)
    mask_n = (n < N)[:, None]
    pair = tl.load(pairs_ptr + n[:, None] * G + g[None, :], mask=mask_n & (g < G)[None, :], other=0)
    byte = tl.load(meta_ptr + n[:, None] * (G // 2) + b[None, :], mask=mask_n & (b < G // 2)[None, :], other=0)
    return _planes(pair, byte, pairs_ptr.dtype.element_ty.primitive_bitwidth // 2, BLOCK_N, BLOCK_G)


@triton.jit
def _dot(w, x, acc, UPCAST: tl.constexpr):
    """acc [BN, BM] + w [BN, BG] @ x [BM, BG].T; w holds the bits of its values."""
    w = w.to(x.dtype, bitcast=True)
    if UPCAST:
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, tl.trans(x), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
def _spmm24_kernel(
    x_ptr, pairs_ptr, meta_ptr, bias_ptr, out_ptr, M, N, stride_xm,
    K: tl.constexpr, G: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """With SPLIT_K = 1 out is y [M, N]; otherwise fp32 partial sums [SPLIT_K, M, N], without the bias."""
    split = tl.program_id(2)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BN]
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
    groups_per_split: tl.constexpr = (G + BLOCK_G * SPLIT_K - 1) // (BLOCK_G * SPLIT_K) * BLOCK_G
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, groups_per_split, BLOCK_G):
        start = split * groups_per_split + step
        w0, w1, w2, w3 = _load_planes(pairs_ptr, meta_ptr, n, start, N, G, BLOCK_N, BLOCK_G)
        k = start * 4 + tl.arange(0, BLOCK_G * 4)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        x_even, x_odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_G, 2, 2)))  # the last axis is the parity of k
        x0, x2 = tl.split(x_even)
        x1, x3 = tl.split(x_odd)
        acc = _dot(w0, x0, acc, UPCAST)
        acc = _dot(w1, x1, acc, UPCAST)
        acc = _dot(w2, x2, acc, UPCAST)
        acc = _dot(w3, x3, acc, UPCAST)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out_ptr += split.to(tl.int64) * M * N
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.trans(acc).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["MN"])
def _add_partial_kernel(
    partial_ptr, bias_ptr, y_ptr, MN, N, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):
    """y = the sum over the first axis of partial [SPLIT_K, M, N], + bias."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT_K):
        total += tl.load(partial_ptr + tl.cast(split, tl.int64) * MN + i, mask=i < MN, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % N, mask=i < MN, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=i < MN)


@triton.jit
def _decompress24_kernel(
    pairs_ptr, meta_ptr, w_ptr, N,
    K: tl.constexpr, G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BN]
    start = tl.program_id(1) * BLOCK_G
    w0, w1, w2, w3 = _load_planes(pairs_ptr, meta_ptr, n, start, N, G, BLOCK_N, BLOCK_G)
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_N, BLOCK_G * 4))
    k = start * 4 + tl.arange(0, BLOCK_G * 4)
    tl.store(w_ptr + n[:, None] * K + k[None, :], w, mask=(n < N)[:, None] & (k < K)[None, :])


@dataclass(frozen=True, kw_only=True)
class Config:
    """One way to launch `_spmm24_kernel`."""

    BLOCK_M: int  # tokens
    BLOCK_N: int  # output features
    BLOCK_G: int  # groups of four input features
    num_warps: int
    num_stages: int  # tiles of values, meta and x in flight
    SPLIT_K: int = 1


# Chosen from register and shared memory use; not yet measured.
CONFIGS = {
    "16-bit, M <= 16": Config(BLOCK_M=16, BLOCK_N=64, BLOCK_G=32, num_warps=4, num_stages=4),
    "16-bit, M <= 32": Config(BLOCK_M=32, BLOCK_N=64, BLOCK_G=32, num_warps=4, num_stages=4),
    "16-bit, M <= 64": Config(BLOCK_M=64, BLOCK_N=128, BLOCK_G=32, num_warps=8, num_stages=3),
    "fp32": Config(BLOCK_M=16, BLOCK_N=64, BLOCK_G=16, num_warps=4, num_stages=3),
}
DECOMPRESS = {"BLOCK_N": 16, "BLOCK_G": 64, "num_warps": 4}


def pick_config(M: int, N: int, K: int, dtype: torch.dtype, sms: int) -> Config:
    """Return the launch for a shape on a GPU with `sms` multiprocessors."""
    if dtype == torch.float32:
        config = CONFIGS["fp32"]
    else:
        config = CONFIGS[f"16-bit, M <= {16 if M <= 16 else 32 if M <= 32 else 64}"]
    blocks = triton.cdiv(N, config.BLOCK_N) * triton.cdiv(M, config.BLOCK_M)
    # Four blocks per multiprocessor, a workspace smaller than the weight, and no slice of K under 512.
    split = min(4 * sms // max(blocks, 1), K // (64 * max(M, 1)), K // 512)
    return replace(config, SPLIT_K=1 << max(split, 1).bit_length() - 1)


def spmm24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias for a canonical 2:4 weight; x is [..., K], the result [..., N].

    Raises:
        ValueError: shapes, dtypes or strides do not fit together.
        RuntimeError: Triton cannot run on the device of `x`; the message says why.
    """
    K = x.shape[-1]
    M = x.numel() // K if K else 0
    if M > DENSE_ABOVE or K == 0:
        return spmm24_large(x, values, meta, bias)
    return spmm24_small(x, values, meta, bias)


def spmm24_small(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """`spmm24` without ever writing the dense weight; correct for any M. `config` overrides the choice by shape."""
    _check(values, meta, x.shape[-1])
    if x.dtype != values.dtype or x.device != values.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, W {values.dtype} on {values.device}: convert one of them")
    N, K = values.shape[0], x.shape[-1]
    if bias is not None and (bias.shape != (N,) or bias.device != x.device):
        raise ValueError(f"bias must be [{N}] on {x.device}, got {tuple(bias.shape)} on {bias.device}")
    # Triton's interpreter multiplies bf16 bit patterns, and rounds to bf16 by cutting: fp32 inside, torch rounds.
    upcast = INTERPRETED and x.dtype == torch.bfloat16
    y = x.new_empty(*x.shape[:-1], N, dtype=torch.float32 if upcast else x.dtype)
    if y.numel() == 0:
        return y.to(x.dtype)
    M = y.numel() // N
    x2d = x.reshape(M, K)
    if x2d.stride(1) != 1:
        x2d = x2d.contiguous()
    bias = None if bias is None else bias.contiguous()
    config = config or pick_config(M, N, K, x.dtype, num_sms(x.device))
    split = config.SPLIT_K
    out = y if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _spmm24_kernel[(triton.cdiv(N, config.BLOCK_N), triton.cdiv(M, config.BLOCK_M), split)](
            x2d, _pairs(values), meta, y if bias is None else bias, out, M, N, x2d.stride(0),
            K=K, G=values.shape[1] // 2, HAS_BIAS=bias is not None and split == 1,
            UPCAST=upcast, SPLIT_K=split,
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_G=config.BLOCK_G,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if split > 1:
            _add_partial_kernel[(triton.cdiv(M * N, 1024),)](
                out, y if bias is None else bias, y, M * N, N, HAS_BIAS=bias is not None, SPLIT_K=split, BLOCK=1024
            )
    return y.to(x.dtype)


def spmm24_large(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """`spmm24` by way of the dense weight, in scratch that is freed on return."""
    return F.linear(x, decompress24(values, meta, x.shape[-1]), bias)


def decompress24(values: Tensor, meta: Tensor, K: int | None = None) -> Tensor:
    """Return the dense weight [N, K], bit for bit what `layout24.decompress24` returns."""
    K = values.shape[-1] * 2 if K is None else K
    _check(values, meta, K)
    N = values.shape[0]
    w = values.new_empty(N, K)
    if w.numel():
        grid = (triton.cdiv(N, DECOMPRESS["BLOCK_N"]), triton.cdiv(K, DECOMPRESS["BLOCK_G"] * GROUP))
        bits = w.view(torch.int32 if w.element_size() == 4 else torch.int16)
        with torch.cuda.device_of(w):
            _decompress24_kernel[grid](_pairs(values), meta, bits, N, K=K, G=values.shape[1] // 2, **DECOMPRESS)
    return w


def _pairs(values: Tensor) -> Tensor:
    """The two slots of each group as one integer [N, Kp/4], the first in the low bits."""
    return values.view(torch.int64 if values.element_size() == 4 else torch.int32)


def _check(values: Tensor, meta: Tensor, K: int) -> None:
    reason = why_not(values.device)
    if reason is not None:
        raise RuntimeError(f"spmm24 cannot run here: {reason}")
    if values.dtype not in DTYPES or meta.dtype != torch.uint8:
        raise ValueError(f"values are {values.dtype}, meta {meta.dtype}: expected one of {DTYPES} and torch.uint8")
    N, Kp = values.shape[0], padded_features(K)
    if values.shape != (N, Kp // 2) or meta.shape != (N, Kp // 8) or meta.device != values.device:
        found = f"values {tuple(values.shape)} and meta {tuple(meta.shape)} on {meta.device}"
        raise ValueError(f"{found} do not hold a weight of {K} features: expected [N, {Kp // 2}] and [N, {Kp // 8}]")
    if not values.is_contiguous() or not meta.is_contiguous():
        raise ValueError("values and meta must be contiguous: call .contiguous() once, when the weight is packed")
