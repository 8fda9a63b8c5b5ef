"""y = x @ W.T + bias on the CPU, with W kept 2:4 and read packed: 9/16 of the dense bytes at 16 bits, 17/32 at 32.

    why_not(dtype)                          None, or why this machine cannot run it
    compress24(w)                           -> values, meta: `layout24.compress24`, compiled
    prepare(values, meta)                   -> blocks, masks: the layout in memory (csrc/spmm24.h), one copy for every M
    restore(blocks, masks, N)               -> values, meta: the exact inverse
    spmm24(x, blocks, masks, N, bias)       -> y

Quantised weights (`quant`), of 5 and 3.125 bits per dense weight, with x and y still bf16 or fp32:

    prepare_int8(values, meta)                       -> blocks, masks: csrc/quantised.h
    restore_int8(blocks, masks, N)                   -> values, meta
    spmm24_int8(x, blocks, masks, scales, N, bias)   -> y
    prepare_int4(values, meta, scales)               -> blocks, masks, scales in the order of the blocks
    restore_int4(blocks, masks, scales, N)           -> values, meta, scales
    spmm24_int4(x, blocks, masks, scales, N, bias)   -> y

bf16 and fp32, sums in fp32. Each y is one sum over k in a fixed order: the same bits whatever M and the number of
threads. Zeros of W are multiplied like any other weight, so a NaN or infinity in x spreads over its row of y exactly
as it does in a dense product. Denormal bf16 count as zero where the processor multiplies bf16 (`avx512_bf16`).

Quantised weights meet x as integers: each token's x become 16 bits (bf16) or 24 bits (fp32) of fixed point for every
128 columns, and sums within these columns are exact. Most bf16 x lose nothing at all. Where an outlier would cost the
other x of its 128 columns their bits, what rounding took from them is multiplied too: each x is then off by at most
2^-30 (bf16) or 2^-46 (fp32) of the outlier, at twice the work for these columns of this token alone. Elsewhere it is
2^-15 or 2^-23 of the largest of the 128; see csrc/quantised.h. `portable` multiplies x as it is.
"""

import ctypes
import functools
import math
import os
import platform
from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit_kernels.cpu.build import BuildError, compiler, library
from sparsekit_kernels.layout24 import padded_features

__all__ = [
    "BuildError",
    "compress24",
    "isa",
    "prepare",
    "prepare_int4",
    "prepare_int8",
    "restore",
    "restore_int4",
    "restore_int8",
    "spmm24",
    "spmm24_int4",
    "spmm24_int8",
    "why_not",
]

BLOCK_ROWS = 8
QUANTISED_ROWS = 32  # rows of a block of a quantised weight
SCALED_COLUMNS = 128  # columns that share a scale at 4 bits
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
_DTYPE_IDS = {torch.bfloat16: 0, torch.float32: 1}


def why_not(dtype: torch.dtype | None = None, *, build: bool = True) -> str | None:
    """Return why this machine cannot run the kernel, in a sentence, or None if it can.

    The first call on a machine compiles the kernels (seconds); with `build=False` nothing is compiled, and the answer
    is None as long as nothing speaks against it.
    """
    if dtype is not None and dtype not in _DTYPE_IDS:
        return f"the CPU kernel multiplies bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if platform.system() != "Linux":
        return f"the CPU kernel is built for Linux, this is {platform.system()}"
    if compiler() is None:
        return "no C++ compiler found: install g++ or clang++, or set CXX"
    if _parallel_for() is None:
        return f"torch {torch.__version__} does not export torch_parallel_for: install a newer torch"
    if build:
        try:
            isa()
        except (BuildError, ValueError) as error:
            return str(error)
    return None


@functools.cache
def isa() -> str:
    """Return the instruction set in use: the best of `ISAS` that runs here, or the lower one in $SPARSEKIT_CPU_ISA."""
    best = ISAS[library().sparsekit_best_isa()]
    asked = os.environ.get("SPARSEKIT_CPU_ISA") or best
    if asked not in ISAS:
        raise ValueError(f"SPARSEKIT_CPU_ISA={asked} is not one of {', '.join(ISAS)}")
    if ISAS.index(asked) > ISAS.index(best):
        raise ValueError(f"SPARSEKIT_CPU_ISA={asked}, but this processor runs at most {best}")
    return asked


def compress24(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values, meta), bit for bit those of `layout24.compress24`; for 16- and 32-bit weights on the CPU.

    Raises:
        ValueError: `w_NK` is not such a matrix, or some group has more than two non-zeros.
    """
    if w_NK.dim() != 2:
        raise ValueError(f"compress24 takes a matrix [N, K], got shape {tuple(w_NK.shape)}")
    if w_NK.device.type != "cpu" or w_NK.element_size() not in (2, 4) or not w_NK.is_floating_point():
        raise ValueError(f"compress24 takes 16- or 32-bit floats on the CPU, got {w_NK.dtype} on {w_NK.device}")
    w_NK = w_NK if w_NK.stride(1) == 1 else w_NK.contiguous()
    N, K = w_NK.shape
    values = torch.empty(N, padded_features(K) // 2, dtype=w_NK.dtype)
    meta = torch.empty(N, padded_features(K) // 8, dtype=torch.uint8)
    call = _functions()["compress24"]
    broken = call(
        w_NK.element_size(), w_NK.data_ptr(), w_NK.stride(0), values.data_ptr(), meta.data_ptr(), N, K, _parallel_for()
    )
    if broken:
        _check_parallel(broken)
        raise ValueError(f"{broken} groups of four have more than two non-zeros: prune the weight to 2:4 first")
    return values, meta


def prepare(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Return (blocks, masks) of a canonical weight; N is rounded up to 8, nothing else is added.

    Args:
        values: [N, Kp/2] of 16 or 32 bits, meta: [N, Kp/8] uint8, see `layout24`.
    Returns:
        blocks [N8, Kp/4, 16] in the dtype of values, masks [N8, Kp/4] int32, N8 = ceil(N / 8); see csrc/spmm24.h.
    """
    N, groups = meta.shape[0], meta.shape[1] * 2
    if values.shape != (N, groups * 2) or meta.dtype != torch.uint8 or values.element_size() not in (2, 4):
        raise ValueError(
            f"prepare takes values [N, Kp/2] of 16 or 32 bits and meta [N, Kp/8] uint8, "
            f"got {tuple(values.shape)} {values.dtype} and {tuple(meta.shape)} {meta.dtype}"
        )
    values, meta = values.contiguous(), meta.contiguous()
    num_blocks = (N + BLOCK_ROWS - 1) // BLOCK_ROWS
    blocks = torch.empty(num_blocks, groups, 2 * BLOCK_ROWS, dtype=values.dtype)
    masks = torch.empty(num_blocks, groups, dtype=torch.int32)
    illegal = _convert("prepare24", values, meta, blocks, masks)
    if illegal:
        raise ValueError(f"{illegal} nibbles of meta are not legal 2:4 metadata: the weight is damaged or foreign")
    return blocks, masks


def restore(blocks: Tensor, masks: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Return (values [N, Kp/2], meta [N, Kp/8]), the exact inverse of `prepare`."""
    num_blocks, groups = masks.shape
    _check_prepared(blocks, masks, N)
    values = torch.empty(N, groups * 2, dtype=blocks.dtype)
    meta = torch.empty(N, groups // 2, dtype=torch.uint8)
    _convert("restore24", values, meta, blocks.contiguous(), masks.contiguous())
    return values, meta


def spmm24(x: Tensor, blocks: Tensor, masks: Tensor, N: int, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias for a prepared 2:4 weight [N, K]; x is [..., K], the result [..., N] in x's dtype."""
    dtype_id = _DTYPE_IDS.get(x.dtype)
    if dtype_id is None or x.dtype != blocks.dtype or not x.is_cpu:
        raise ValueError(
            f"spmm24 takes x and W of one dtype, bfloat16 or float32, on the CPU; "
            f"got {x.dtype} on {x.device} and {blocks.dtype}"
        )
    _check_prepared(blocks, masks, N)
    x, y, bias, M, stride = _operands(x, bias, masks, N)
    level, call, parallel_for = _spmm24()
    status = call(
        level, dtype_id, x.data_ptr(), stride, blocks.data_ptr(), masks.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(), M, N, x.shape[-1], parallel_for,
    )  # fmt: skip
    if status:
        _raise(status, M, x.shape[-1])
    return y


def prepare_int8(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Return (blocks, masks) of a canonical `semi24_int8` weight; N is rounded up to 32, nothing else is added.

    Args:
        values: int8 [N, Kp/2], meta: uint8 [N, Kp/8], see `layout24`.
    Returns:
        blocks uint8 [N32, Kp/4, 64], masks int64 [N32, Kp/4, 2], N32 = ceil(N / 32); see csrc/quantised.h.
    """
    return _prepare_quantised(8, values, meta)


def restore_int8(blocks: Tensor, masks: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Return (values int8 [N, Kp/2], meta uint8 [N, Kp/8]), the exact inverse of `prepare_int8`."""
    return _restore_quantised(8, blocks, masks, N)


def spmm24_int8(x: Tensor, blocks: Tensor, masks: Tensor, scales: Tensor, N: int, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias for a prepared 8-bit weight [N, K].

    Args:
        x: [..., K] bfloat16 or float32.
        blocks, masks: from `prepare_int8`.
        scales: float32 [N], W[n, k] = q[n, k] * scales[n].
        bias: [N] in the dtype of x.
    Returns:
        [..., N] in the dtype of x.
    """
    if scales.shape != (N,) or scales.dtype != torch.float32:
        raise ValueError(f"scales must be [{N}] float32, got {tuple(scales.shape)} {scales.dtype}")
    return _spmm24_quantised(8, x, blocks, masks, scales, N, bias)


def prepare_int4(values: Tensor, meta: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (blocks, masks, scales) of a canonical `semi24_int4` weight; N is rounded up to 32, nothing else is added.

    Args:
        values: uint8 [N, Kp/4], a pair in each byte; meta: uint8 [N, Kp/8], see `layout24`.
        scales: bfloat16 [N, B], B = ceil(K / 128).
    Returns:
        blocks uint8 [N32, Kp/4, 32], masks int64 [N32, Kp/4, 2], scales bfloat16 [N32, B, 32], N32 = ceil(N / 32); see
        csrc/quantised.h.
    """
    blocks, masks = _prepare_quantised(4, values, meta)
    N, num_scales = meta.shape[0], _num_scales(masks)
    if scales.shape != (N, num_scales) or scales.dtype != torch.bfloat16:
        raise ValueError(f"scales must be [{N}, {num_scales}] bfloat16, got {tuple(scales.shape)} {scales.dtype}")
    padded = F.pad(scales, (0, 0, 0, -N % QUANTISED_ROWS)).unflatten(0, (blocks.shape[0], QUANTISED_ROWS))
    return blocks, masks, padded.transpose(1, 2).contiguous()


def restore_int4(blocks: Tensor, masks: Tensor, scales: Tensor, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values uint8 [N, Kp/4], meta uint8 [N, Kp/8], scales bfloat16 [N, B]), the exact inverse."""
    _check_scales_int4(scales, masks)
    values, meta = _restore_quantised(4, blocks, masks, N)
    return values, meta, scales.transpose(1, 2).flatten(0, 1)[:N].contiguous()


def spmm24_int4(x: Tensor, blocks: Tensor, masks: Tensor, scales: Tensor, N: int, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias for a prepared 4-bit weight [N, K], W[n, k] = q[n, k] * scale[n, k // 128].

    Args:
        x: [..., K] bfloat16 or float32.
        blocks, masks, scales: from `prepare_int4`.
        bias: [N] in the dtype of x.
    Returns:
        [..., N] in the dtype of x.
    """
    _check_scales_int4(scales, masks)
    return _spmm24_quantised(4, x, blocks, masks, scales, N, bias)


def _prepare_quantised(bits: int, values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    stored = torch.int8 if bits == 8 else torch.uint8
    pair_bytes = bits // 4
    N, groups = meta.shape[0], meta.shape[1] * 2
    if values.shape != (N, groups * pair_bytes) or values.dtype != stored or meta.dtype != torch.uint8:
        raise ValueError(
            f"prepare_int{bits} takes values [N, Kp/{4 // pair_bytes}] {stored} and meta [N, Kp/8] uint8, "
            f"got {tuple(values.shape)} {values.dtype} and {tuple(meta.shape)} {meta.dtype}"
        )
    num_blocks = (N + QUANTISED_ROWS - 1) // QUANTISED_ROWS
    blocks = torch.empty(num_blocks, groups, QUANTISED_ROWS * pair_bytes, dtype=torch.uint8)
    masks = torch.empty(num_blocks, groups, 2, dtype=torch.int64)
    illegal = _convert_quantised("prepare24_quantised", bits, values.contiguous(), meta.contiguous(), blocks, masks)
    if illegal:
        raise ValueError(f"{illegal} nibbles of meta are not legal 2:4 metadata: the weight is damaged or foreign")
    return blocks, masks


def _restore_quantised(bits: int, blocks: Tensor, masks: Tensor, N: int) -> tuple[Tensor, Tensor]:
    _check_prepared_quantised(bits, blocks, masks, N)
    groups = masks.shape[1]
    values = torch.empty(N, groups * bits // 4, dtype=torch.int8 if bits == 8 else torch.uint8)
    meta = torch.empty(N, groups // 2, dtype=torch.uint8)
    _convert_quantised("restore24_quantised", bits, values, meta, blocks, masks)
    return values, meta


def _spmm24_quantised(
    bits: int, x: Tensor, blocks: Tensor, masks: Tensor, scales: Tensor, N: int, bias: Tensor | None
) -> Tensor:
    dtype_id = _DTYPE_IDS.get(x.dtype)
    if dtype_id is None or not x.is_cpu:
        raise ValueError(f"spmm24_int{bits} takes x in bfloat16 or float32 on the CPU, got {x.dtype} on {x.device}")
    _check_prepared_quantised(bits, blocks, masks, N)
    x, y, bias, M, stride = _operands(x, bias, masks, N)
    scales = scales.contiguous()
    level, call, parallel_for = _spmm24("spmm24_quantised")
    status = call(
        level, dtype_id, x.data_ptr(), stride, blocks.data_ptr(), masks.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(), M, N, x.shape[-1], parallel_for,
        bits, scales.data_ptr(),
    )  # fmt: skip
    if status:
        _raise(status, M, x.shape[-1])
    return y


def _operands(x: Tensor, bias: Tensor | None, masks: Tensor, N: int) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """Return x with rows a fixed stride apart, y for it, bias in one piece, the number of rows and their stride."""
    *leading, K = x.shape
    if (K + 7) // 8 * 2 != masks.shape[1]:
        raise ValueError(f"x has {K} features, W has {masks.shape[1] * 4} (rounded up to 8): pass x of shape [..., K]")
    if bias is not None:
        if bias.shape != (N,) or bias.dtype != x.dtype:
            raise ValueError(f"bias must be [{N}] {x.dtype}, got {tuple(bias.shape)} {bias.dtype}")
        bias = bias.contiguous()
    y = x.new_empty(*leading, N)  # 0.6 us less than torch.empty with a shape and a dtype
    if x.is_contiguous():  # the usual case, without a view of x: each costs a microsecond
        return x, y, bias, x.numel() // K if K else math.prod(leading), K
    x = x if x.dim() == 2 else x.reshape(-1, K)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, y, bias, x.shape[0], x.stride(0)


def _check_prepared(blocks: Tensor, masks: Tensor, N: int) -> None:
    num_blocks, groups = masks.shape
    if (
        num_blocks != (N + BLOCK_ROWS - 1) // BLOCK_ROWS
        or blocks.shape != (num_blocks, groups, 2 * BLOCK_ROWS)
        or masks.dtype != torch.int32
        or not blocks.is_contiguous()
        or not masks.is_contiguous()
    ):
        raise ValueError(
            f"blocks {tuple(blocks.shape)} and masks {tuple(masks.shape)} {masks.dtype} "
            f"are not what prepare() returns for N={N}"
        )


def _check_prepared_quantised(bits: int, blocks: Tensor, masks: Tensor, N: int) -> None:
    num_blocks, groups, _ = masks.shape
    if (
        num_blocks != (N + QUANTISED_ROWS - 1) // QUANTISED_ROWS
        or blocks.shape != (num_blocks, groups, QUANTISED_ROWS * bits // 4)
        or blocks.dtype != torch.uint8
        or masks.dtype != torch.int64
        or not blocks.is_contiguous()
        or not masks.is_contiguous()
    ):
        raise ValueError(
            f"blocks {tuple(blocks.shape)} {blocks.dtype} and masks {tuple(masks.shape)} {masks.dtype} "
            f"are not what prepare_int{bits}() returns for N={N}"
        )


def _num_scales(masks: Tensor) -> int:
    return (masks.shape[1] * 4 + SCALED_COLUMNS - 1) // SCALED_COLUMNS


def _check_scales_int4(scales: Tensor, masks: Tensor) -> None:
    if scales.shape != (masks.shape[0], _num_scales(masks), QUANTISED_ROWS) or scales.dtype != torch.bfloat16:
        raise ValueError(
            f"scales must be [{masks.shape[0]}, {_num_scales(masks)}, {QUANTISED_ROWS}] bfloat16, "
            f"as prepare_int4() returns them, got {tuple(scales.shape)} {scales.dtype}"
        )


def _convert(name: str, values: Tensor, meta: Tensor, blocks: Tensor, masks: Tensor) -> int:
    call = _functions()[name]
    N, half = values.shape
    tensors = (values.data_ptr(), meta.data_ptr(), blocks.data_ptr(), masks.data_ptr())
    bad = call(values.element_size(), *tensors, N, half * 2, _parallel_for())
    _check_parallel(bad)
    return bad


def _convert_quantised(name: str, bits: int, values: Tensor, meta: Tensor, blocks: Tensor, masks: Tensor) -> int:
    tensors = (values.data_ptr(), meta.data_ptr(), blocks.data_ptr(), masks.data_ptr())
    bad = _functions()[name](bits, *tensors, meta.shape[0], meta.shape[1] * 8, _parallel_for())
    _check_parallel(bad)
    return bad


def _raise(status: int, M: int, K: int) -> None:
    if status == 1:
        raise MemoryError(f"no memory for the scratch of a product of {M} tokens and {K} features")
    _check_parallel(-1)


def _check_parallel(status: int) -> None:
    if status < 0:
        raise RuntimeError("torch_parallel_for failed: see torch's message above")


@functools.cache
def _parallel_for() -> int | None:
    """Return the address of torch's own parallel loop, or None where torch does not export it."""
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (AttributeError, OSError):
        return None
    return ctypes.cast(function, c_void_p).value


@functools.cache
def _functions() -> dict:
    """Return the compiled functions with their argument types set."""
    reason = why_not()
    if reason is not None:
        raise BuildError(reason)
    product = [c_int64, c_int64, c_void_p, c_int64, *[c_void_p] * 4, *[c_int64] * 3, c_void_p]
    conversion = [c_int64, *[c_void_p] * 4, c_int64, c_int64, c_void_p]
    pointers = {
        "spmm24": product,
        "spmm24_quantised": [*product, c_int64, c_void_p],
        "prepare24": conversion,
        "restore24": conversion,
        "prepare24_quantised": conversion,
        "restore24_quantised": conversion,
        "compress24": [c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p],
    }
    functions = {}
    for name, argument_types in pointers.items():
        function = getattr(library(), f"sparsekit_{name}")
        function.argtypes, function.restype = argument_types, c_int64
        functions[name] = function
    return functions


@functools.cache
def _spmm24(name: str = "spmm24") -> tuple:
    """Return the level of the instruction set, the compiled product and the address of torch's parallel loop."""
    return ISAS.index(isa()), _functions()[name], _parallel_for()
