"""Activations as int8 with a scale for each token, for int8 weights on the integer tensor cores.

A block reads one row, twice: for its largest absolute value, from memory, and to round it, from L1 or L2. Symmetric,
round to nearest even; the scale is the largest value over 127, as float32 division rounds it.
"""

# What Triton compiles takes Triton's values, which have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit_kernels.launch import Kernel
from sparsekit_kernels.target import why_not

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW_BYTES = 16  # the rows of q begin at multiples of it


@triton.jit(do_not_specialize=["x_ptr", "K", "stride_xm"])
def _quantize_tokens_kernel(x_ptr, q_ptr, scales_ptr, K, stride_xm, stride_qm, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    # The bits of absolute values have the order of the numbers, with inf and then NaN at the end.
    bits = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + m * stride_xm + start + i, mask=start + i < K, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(bits, axis=0)
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scales_ptr + m, scale)
    finite = largest < 0x7F800000
    step = tl.where(finite, scale, 1.0)
    for start in range(0, stride_qm, BLOCK):
        x = tl.load(x_ptr + m * stride_xm + start + i, mask=(start + i < K) & finite, other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(tl.div_rn(x, step), -127.0), 127.0)
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2**23, where the unit in the last place is one: nearest even
        tl.store(q_ptr + m * stride_qm + start + i, x.to(tl.int8), mask=start + i < stride_qm)


_kernels: dict[tuple[torch.dtype, int, int], Kernel] = {}  # by dtype, device and block


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (q int8 [..., K], scales float32 [...]) with x = q * scale, |q| <= 127, of a row x[..., :] each.

    A row of zeros has the scale 1. A row with inf or NaN has q = 0 and the scale inf or NaN: what is computed from it
    is NaN.

    Args:
        x: [..., K] bf16, fp16 or fp32, K > 0; rows may be strided.
    Returns:
        q with rows that begin at multiples of 16 bytes, zeros behind them, as `spmm24_mma.spmm24_int8` reads them.
    Raises:
        ValueError: x has another dtype or no features.
        RuntimeError: Triton cannot run on the device of `x`; the message says why.
    """
    reason = why_not(x.device)
    if reason is not None:
        raise RuntimeError(f"quantize_tokens cannot run here: {reason}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: expected {', '.join(map(str, DTYPES))}, convert it")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x is {tuple(x.shape)}: it has no features, [..., K] with K > 0 is needed")
    K = x.shape[-1]
    rows = x.reshape(-1, K)
    rows = rows if rows.stride(1) == 1 or K == 1 else rows.contiguous()
    M, stride = rows.shape[0], -(-K // ROW_BYTES) * ROW_BYTES
    q = x.new_empty(M, stride, dtype=torch.int8)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if M:
        block = min(triton.next_power_of_2(stride), 8192)
        key = x.dtype, x.get_device(), block
        kernel = _kernels.get(key)
        if kernel is None:
            kernel = _kernels[key] = Kernel(_quantize_tokens_kernel, {"BLOCK": block}, max(1, min(block // 512, 8)))
        with torch.cuda.device_of(x):
            kernel((M, 1, 1), rows, q, scales, K, rows.stride(0), stride)
    return q.view(*x.shape[:-1], stride)[..., :K], scales
