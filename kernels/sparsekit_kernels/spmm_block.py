"""y = x @ W.T + bias + residual with W block-sparse: only the stored blocks are read and multiplied.

x [M, K], residual and y [M, N] are row-major; W [N, K] lies in the canonical layout of `layout_block`: values
[S, BN, BK], columns [S], row_pointers [NB + 1]. bf16, fp16 and fp32, any M, N, K and density, compute capability 8.0
and newer. Sides of blocks are multiples of 16. A block row is a matrix [BN, S_row * BK] whose columns are some of the
inputs, in order; all kernels walk along it in steps of their own BLOCK_K, so blocks narrower than a step are merged on
the way, as many as fit, and wider ones are cut. Taller blocks are cut into strips of a kernel's ROWS. Small blocks work
thus, but each 64 columns of a 16 x 16 weight gather x in four places, and tiles of 16 rows use tensor cores badly at
prefill.

Decode, up to 64 tokens (8 in fp32). Bound by the bytes of W, which is streamed once with 16-byte loads, while x is
small and read from the caches. A program takes one strip of an item of the work list that `prepare` makes: a block row,
or a part of one that is much longer than the others. Its warps split the columns among themselves (the batch of a 3-D
dot; with one token, FMAs on registers), which fills the GPU without splitting K over programs. Parts of a cut row leave
fp32 sums that are added in their order, so the same call gives the same bits every time.

Prefill, more tokens. Tiles of BLOCK_M tokens x ROWS outputs on the tensor cores, longest block rows first. From
`DENSE_ABOVE` of the blocks stored the weight is decompressed into scratch and multiplied by the dense library.
"""

# What Triton compiles takes Triton's values, which have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsekit_kernels.layout_block import decompress_block
from sparsekit_kernels.target import INTERPRETED, why_not

DENSE_ABOVE = 0.8  # share of the blocks stored; beyond it a prefill is dense. Not yet measured
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIDE = 16  # sides of blocks are multiples of it


@triton.jit
def _inputs(columns_ptr, place, first, last, K: tl.constexpr, BK: tl.constexpr):
    """The stored block and the input feature at `place` columns into the blocks first .. last; K or more beyond."""
    slot = first + place // BK
    column = tl.load(columns_ptr + slot, mask=slot < last, other=K)
    return slot, column * BK + place % BK


@triton.jit
def _store(y_ptr, bias_ptr, residual_ptr, acc, m, n, M, N, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """y[m, n] = acc [len(m), len(n)] + bias[n] + residual[m, n], inside M x N."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    offset = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_parts"])
def _vector_kernel(
    x_ptr, values_ptr, columns_ptr, work_ptr, bias_ptr, residual_ptr, y_ptr, parts_ptr, N, num_parts,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LONGEST: tl.constexpr, HAS_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token: products in registers, added over the 16 bytes of a load, and over all columns at the end."""
    VECTOR: tl.constexpr = 128 // values_ptr.dtype.element_ty.primitive_bitwidth
    item = tl.program_id(0)
    row = tl.load(work_ptr + item * 3)
    first = tl.load(work_ptr + item * 3 + 1)
    last = tl.load(work_ptr + item * 3 + 2)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # row in the block
    acc = tl.zeros((ROWS, BLOCK_K // VECTOR), tl.float32)
    end = LONGEST if LONGEST > 0 else (last - first) * BK
    for start in range(0, end, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        block = (first + place // BK).to(tl.int64) * (BN * BK) + place % BK
        inside = first + place // BK < last
        w_ptrs = values_ptr + r[:, None] * BK + block[None, :]
        w = tl.load(w_ptrs, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        tl.debug_barrier()  # or ptxas has the loads of W wait for the columns, on which those of x depend
        _, k = _inputs(columns_ptr, place, first, last, K, BK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last")
        products = w.to(tl.float32) * x.to(tl.float32)[None, :]
        acc += tl.sum(tl.reshape(products, (ROWS, BLOCK_K // VECTOR, VECTOR)), 2)
    total = tl.sum(acc, 1)
    n = row * BN + r
    if HAS_PARTS:
        if item < num_parts:
            tl.store(parts_ptr + item.to(tl.int64) * BN + r, total)
            return
    _store(y_ptr, bias_ptr, residual_ptr, total[None, :], tl.arange(0, 1), n, 1, N, HAS_BIAS, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["M", "num_parts"])
def _decode_kernel(
    x_ptr, values_ptr, columns_ptr, work_ptr, bias_ptr, residual_ptr, y_ptr, parts_ptr, M, N, num_parts, stride_xm,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LONGEST: tl.constexpr, HAS_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M tokens; each warp multiplies BLOCK_K columns of its own, and their sums are added at the end."""
    item = tl.program_id(0)
    row = tl.load(work_ptr + item * 3)
    first = tl.load(work_ptr + item * 3 + 1)
    last = tl.load(work_ptr + item * 3 + 2)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # row in the block
    m = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, WARPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :, None] * stride_xm
    acc = tl.zeros((WARPS, ROWS, BLOCK_M), tl.float32)
    end = LONGEST if LONGEST > 0 else (last - first) * BK
    for start in range(0, end, WARPS * BLOCK_K):
        place = start + lane  # [WARPS, BK]
        slot, k = _inputs(columns_ptr, place, first, last, K, BK)
        block = slot.to(tl.int64) * (BN * BK) + place % BK
        w_ptrs = values_ptr + r[None, :, None] * BK + block[:, None, :]
        w = tl.load(w_ptrs, mask=(slot < last)[:, None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + k[:, None, :], mask=(m < M)[None, :, None] & (k < K)[:, None, :], other=0.0)
        if UPCAST:  # Triton's interpreter multiplies bf16 bit patterns
            w, x = w.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
    total = tl.trans(tl.sum(acc, 0))  # [BM, ROWS]
    n = row * BN + r
    if HAS_PARTS:
        if item < num_parts:
            part = parts_ptr + item.to(tl.int64) * M * BN + m[:, None] * BN + r[None, :]
            tl.store(part, total, mask=(m < M)[:, None])
            return
    _store(y_ptr, bias_ptr, residual_ptr, total, m, n, M, N, HAS_BIAS, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["M"])
def _add_parts_kernel(
    parts_ptr, cut_rows_ptr, bias_ptr, residual_ptr, y_ptr, M, N, BN: tl.constexpr, LONGEST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y of one token and one cut block row: the sum of its parts [parts, M, BN], in their order."""
    row = tl.load(cut_rows_ptr + tl.program_id(0) * 3)
    first = tl.load(cut_rows_ptr + tl.program_id(0) * 3 + 1)
    last = tl.load(cut_rows_ptr + tl.program_id(0) * 3 + 2)
    m = tl.program_id(1) + tl.arange(0, 1)
    r = tl.arange(0, BLOCK_N)
    total = tl.zeros((1, BLOCK_N), tl.float32)
    num_parts = LONGEST if LONGEST > 0 else last - first
    for i in range(num_parts):
        part = parts_ptr + (first + i).to(tl.int64) * M * BN + m[:, None] * BN + r[None, :]
        total += tl.load(part, mask=(r < BN)[None, :] & (first + i < last), other=0.0)
    n = tl.where(r < BN, row * BN + r, N)
    _store(y_ptr, bias_ptr, residual_ptr, total, m, n, M, N, HAS_BIAS, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["M"])
def _prefill_kernel(
    x_ptr, values_ptr, columns_ptr, row_pointers_ptr, order_ptr, bias_ptr, residual_ptr, y_ptr, M, N, num_rows,
    stride_xm, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LONGEST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M tokens x ROWS outputs. Programs of one group of tokens follow one another and share x in L2."""
    num_tiles = tl.cdiv(M, BLOCK_M)
    strips = num_rows * (BN // ROWS)
    group = tl.program_id(0) // (GROUP_M * strips)
    width = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    place_in_group = tl.program_id(0) % (GROUP_M * strips)
    strip = place_in_group // width
    row = tl.load(order_ptr + strip // (BN // ROWS))
    first = tl.load(row_pointers_ptr + row)
    last = tl.load(row_pointers_ptr + row + 1)
    r = strip % (BN // ROWS) * ROWS + tl.arange(0, ROWS)  # row in the block
    m = (group * GROUP_M + place_in_group % width) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, ROWS), tl.float32)
    end = LONGEST if LONGEST > 0 else (last - first) * BK
    for start in range(0, end, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        slot, k = _inputs(columns_ptr, place, first, last, K, BK)
        block = slot.to(tl.int64) * (BN * BK) + place % BK
        w = tl.load(values_ptr + r[:, None] * BK + block[None, :], mask=(slot < last)[None, :], other=0.0)
        x = tl.load(x_ptrs + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        if UPCAST:
            w, x = w.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    _store(y_ptr, bias_ptr, residual_ptr, acc, m, row * BN + r, M, N, HAS_BIAS, HAS_RESIDUAL)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One way to launch a kernel."""

    kernel: str  # "vector", "decode" or "prefill"
    ROWS: int  # of W; the largest power of two that divides both it and BN is taken
    BLOCK_M: int  # tokens
    BLOCK_K: int  # stored columns a step; of each warp at decode
    num_warps: int
    depth: int  # tiles of W and x in shared memory, all but one of them in flight; the vector kernel has registers

    @property
    def num_stages(self) -> int:
        """Triton's count: two stages a tile, since x is gathered by loaded columns, and two more."""
        return 2 * self.depth + 2


# Chosen from instructions, registers and shared memory; not yet measured.
CONFIGS = {
    "16-bit, M = 1": Config(kernel="vector", ROWS=16, BLOCK_M=1, BLOCK_K=512, num_warps=4, depth=0),
    "16-bit, M <= 8": Config(kernel="decode", ROWS=16, BLOCK_M=8, BLOCK_K=64, num_warps=4, depth=3),
    "16-bit, M <= 16": Config(kernel="decode", ROWS=16, BLOCK_M=16, BLOCK_K=64, num_warps=4, depth=3),
    "16-bit, M <= 32": Config(kernel="decode", ROWS=32, BLOCK_M=32, BLOCK_K=64, num_warps=4, depth=2),
    "16-bit, M <= 64": Config(kernel="decode", ROWS=32, BLOCK_M=64, BLOCK_K=32, num_warps=4, depth=3),
    "16-bit, more": Config(kernel="prefill", ROWS=128, BLOCK_M=128, BLOCK_K=64, num_warps=8, depth=3),
    "fp32, M = 1": Config(kernel="vector", ROWS=16, BLOCK_M=1, BLOCK_K=256, num_warps=4, depth=0),
    "fp32, M <= 8": Config(kernel="decode", ROWS=16, BLOCK_M=8, BLOCK_K=32, num_warps=4, depth=3),
    "fp32, more": Config(kernel="prefill", ROWS=32, BLOCK_M=64, BLOCK_K=16, num_warps=4, depth=3),
}
BUCKETS = {"16-bit": (8, 16, 32, 64), "fp32": (8,)}  # tokens
GROUP_M = 8  # tiles of tokens whose x is in L2 at a time
# At least this many columns go to a program before a block row is cut, and half as many again as the mean of two
# programs a multiprocessor: below that its loads are in flight at once anyway. Not yet measured.
CUT_ABOVE = 2048
PROGRAMS_PER_SM = 2


def pick_config(M: int, dtype: torch.dtype, BN: int, shared_kib: int = 227) -> Config:
    """Return the launch for M tokens on a GPU whose programs may have `shared_kib` KiB of shared memory."""
    kind = "fp32" if dtype == torch.float32 else "16-bit"
    bucket = next((f"M <= {bound}" for bound in BUCKETS[kind] if M <= bound), "more") if M > 1 else "M = 1"
    config = CONFIGS[f"{kind}, {bucket}"]
    depth = 2 if config.kernel == "prefill" and shared_kib < 128 else config.depth
    return replace(config, ROWS=math.gcd(config.ROWS, BN), depth=depth)


def prepare(values: Tensor, columns: Tensor, row_pointers: Tensor, num_sms: int) -> tuple[Tensor, ...]:
    """Return what `spmm_block` takes: the three canonical tensors, and how to share out the work, made once.

    Args:
        values, columns, row_pointers: as `layout_block.compress_block` returns them.
        num_sms: multiprocessors of the GPU.
    Returns:
        values, columns, row_pointers;
        order: int32 [NB], the block rows, those with most blocks first;
        work: int32 [items, 3], (block row, first block, end) of each item; parts of cut rows first, then whole rows,
            the longest first;
        cut_rows: int32 [cut rows, 3], (block row, first item, end).
    Raises:
        ValueError: a side of the blocks is no multiple of 16.
    """
    S, BN, BK = values.shape
    if BN % SIDE or BK % SIDE or not BN or not BK:
        raise ValueError(f"blocks of {BN}x{BK} cannot run here: both sides must be multiples of {SIDE}, as 64x64")
    pointers = row_pointers.tolist()
    counts = row_pointers.diff()
    order = counts.argsort(descending=True, stable=True).to(torch.int32)
    share = math.ceil(S * (BN // math.gcd(BN, SIDE)) / (num_sms * PROGRAMS_PER_SM))
    longest = max(CUT_ABOVE // BK, 1, share + share // 2)
    parts: list[tuple[int, int, int]] = []
    whole: list[tuple[int, int, int]] = []
    cut_rows: list[tuple[int, int, int]] = []
    for row in order.tolist():
        first, last = pointers[row], pointers[row + 1]
        num_parts = -(-(last - first) // longest)
        if num_parts <= 1:
            whole.append((row, first, last))
            continue
        cut_rows.append((row, len(parts), len(parts) + num_parts))
        bounds = [first + i * (last - first) // num_parts for i in range(num_parts + 1)]
        parts += [(row, begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]

    def table(entries: list[tuple[int, int, int]]) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32, device=values.device).view(-1, 3)

    canonical = [part.contiguous() for part in (values, columns, row_pointers)]
    canonical = [part.clone() if part.data_ptr() % 16 else part for part in canonical]
    return *canonical, order, table(parts + whole), table(cut_rows)


def spmm_block(
    x: Tensor,
    prepared: Sequence[Tensor],
    N: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Return x @ W.T + bias + residual for a weight that `prepare` prepared; x is [..., K], the result [..., N].

    `config` overrides the choice by shape. A block weight knows K to whole blocks only: the caller vouches that K is
    that of x. Blocks that are not stored do not meet x: inf or NaN of x there leaves a result alone.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, as far as the tensors tell.
        RuntimeError: Triton cannot run on the device of `x`; the message says why.
    """
    shape, values = x.shape, prepared[0]
    rows, stride = x, shape[-1]
    if not x.is_contiguous():
        rows = x.reshape(shape[:-1].numel(), shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        stride = rows.stride(0)
    key = (
        shape, stride, x.dtype, x.device, N, config, values.shape, values.dtype, values.device,
        prepared[4].shape, prepared[5].shape, None if bias is None else (bias.shape, bias.dtype, bias.device),
        None if residual is None else (residual.shape, residual.dtype, residual.device),
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None or INTERPRETED:
        _check(x, values, prepared[2], N, bias, residual)
        launch = _Launch(x, stride, prepared, N, bias, residual, config)
        if key not in _launches and len(_launches) >= MOST_LAUNCHES:
            _launches.pop(next(iter(_launches)), None)
        _launches[key] = launch
    if launch.is_dense:
        values, columns, row_pointers = prepared[:3]
        y = F.linear(x, decompress_block(values, columns, row_pointers, N, shape[-1]), bias)
        return y if residual is None else y + residual
    y = x.new_empty(*shape[:-1], N, dtype=launch.dtype)
    if launch.M and N:
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else residual.contiguous()
        with torch.cuda.device_of(x):  # Triton launches on the current device
            launch(rows, prepared, bias, residual, y)
    return y if launch.dtype == x.dtype else y.to(x.dtype)


class _Kernel:
    """A kernel, its grid and its constants. The first call compiles it; later ones go straight to the driver.

    Triton compiles for the numbers it is given, which are those of the key of `_launches`, and for pointers that are
    multiples of 16, as those of `prepare` and of new tensors are. With others it is asked anew each time.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], constants: dict[str, Any], options: dict[str, int]
    ) -> None:
        self.kernel, self.grid, self.constants, self.options = kernel, grid, constants, options
        self.tail = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.run: Callable[..., None] | None = None

    def __call__(self, aligned: bool, *args: Tensor | int | None) -> None:
        if self.run is not None and aligned:
            self.run(*args, *self.tail)
            return
        compiled = self.kernel[self.grid](*args, **self.constants, **self.options)
        if aligned and not INTERPRETED:
            self.run = compiled[self.grid]


class _Launch:
    """What a call can know from shapes, dtypes and the device: config and kernels."""

    def __init__(
        self, x: Tensor, stride: int, prepared: Sequence[Tensor], N: int, bias: Tensor | None,
        residual: Tensor | None, config: Config | None,
    ) -> None:  # fmt: skip
        values, _, row_pointers, order, work, cut_rows = prepared
        (S, self.BN, BK), self.num_rows = values.shape, order.shape[0]
        self.M, K, self.N, self.stride = x.shape[:-1].numel(), x.shape[-1], N, stride
        chosen = config or pick_config(self.M, x.dtype, self.BN, _shared_kib(x.device))
        self.kind = chosen.kernel
        full = S > DENSE_ABOVE * self.num_rows * -(-K // BK)
        self.is_dense = self.kind == "prefill" and full and config is None
        # Triton's interpreter multiplies bf16 bit patterns, and rounds to bf16 by cutting: fp32 inside, torch rounds.
        upcast = INTERPRETED and x.dtype == torch.bfloat16
        self.dtype = torch.float32 if upcast else x.dtype
        num_items, num_cut = work.shape[0], cut_rows.shape[0]
        self.num_parts = num_items - (self.num_rows - num_cut)  # each row that is not cut is one item
        flags = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
        tile = {"BN": self.BN, "BK": BK, "K": K, "ROWS": chosen.ROWS, "BLOCK_K": chosen.BLOCK_K, **flags}
        strips = self.BN // chosen.ROWS
        if self.kind == "prefill":
            kernel: Any = _prefill_kernel
            grid = (triton.cdiv(self.M, chosen.BLOCK_M) * self.num_rows * strips, 1, 1)
            tile |= {"LONGEST": _longest(row_pointers.diff()) * BK, "GROUP_M": GROUP_M}
        else:
            kernel = _vector_kernel if self.kind == "vector" else _decode_kernel
            grid = (num_items, strips, 1)
            tile |= {"LONGEST": _longest(work[:, 2] - work[:, 1]) * BK, "HAS_PARTS": num_cut > 0}
        options = {"num_warps": chosen.num_warps}
        if self.kind != "vector":
            tile |= {"BLOCK_M": chosen.BLOCK_M, "UPCAST": upcast}
            options["num_stages"] = chosen.num_stages
        if self.kind == "decode":
            tile["WARPS"] = chosen.num_warps
        self.multiply = _Kernel(kernel, grid, tile, options)
        longest = _longest(cut_rows[:, 2] - cut_rows[:, 1])
        add = {"BN": self.BN, "LONGEST": longest, "BLOCK_N": triton.next_power_of_2(self.BN), **flags}
        self.add_parts = _Kernel(_add_parts_kernel, (num_cut, self.M, 1), add, {"num_warps": 4}) if num_cut else None

    def __call__(
        self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, residual: Tensor | None, y: Tensor
    ) -> None:
        values, columns, row_pointers, order, work, cut_rows = prepared
        epilogue, M, N = (bias, residual, y), self.M, self.N
        aligned = all([t is None or t.data_ptr() % 16 == 0 for t in (x, bias, residual)])
        if self.kind == "prefill":
            weight = (values, columns, row_pointers, order)
            self.multiply(aligned, x, *weight, *epilogue, M, N, self.num_rows, self.stride)
            return
        parts = None
        if self.add_parts is not None:
            parts = x.new_empty(self.num_parts, M, self.BN, dtype=torch.float32)
        if self.kind == "vector":
            self.multiply(aligned, x, values, columns, work, *epilogue, parts, N, self.num_parts)
        else:
            self.multiply(aligned, x, values, columns, work, *epilogue, parts, M, N, self.num_parts, self.stride)
        if self.add_parts is not None:
            self.add_parts(aligned, parts, cut_rows, *epilogue, M, N)


MOST_LAUNCHES = 4096  # the oldest make room; what Triton compiled, it keeps itself

_launches: dict[tuple[Any, ...], _Launch] = {}


def _longest(counts: Tensor) -> int:
    """Return 0: each program runs to its own end. Triton 3.6 interprets constant bounds only, so there the longest."""
    return max([1, *counts.tolist()]) if INTERPRETED else 0


@functools.cache
def _shared_kib(device: torch.device) -> int:
    if INTERPRETED:
        return 227
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the field
    return int(properties.shared_memory_per_block_optin) >> 10


def _check(
    x: Tensor, values: Tensor, row_pointers: Tensor, N: int, bias: Tensor | None, residual: Tensor | None
) -> None:
    reason = why_not(x.device)
    if reason is not None:
        raise RuntimeError(f"spmm_block cannot run here: {reason}")
    if x.dtype not in DTYPES or x.dtype != values.dtype or x.device != values.device:
        found = f"x is {x.dtype} on {x.device}, W is {values.dtype} on {values.device}"
        raise ValueError(f"{found}: convert one of them, to one of {DTYPES}")
    BN = values.shape[1]
    if row_pointers.shape[0] != -(-N // BN) + 1:
        raise ValueError(f"W has {row_pointers.shape[0] - 1} rows of blocks, N={N} needs {-(-N // BN)}: pass its N")
    if bias is not None and (bias.shape != (N,) or bias.device != x.device):
        raise ValueError(f"bias must be [{N}] on {x.device}, got {tuple(bias.shape)} on {bias.device}")
    if residual is not None and (residual.shape != (*x.shape[:-1], N) or residual.device != x.device):
        expected = f"[{', '.join(map(str, (*x.shape[:-1], N)))}] on {x.device}"
        raise ValueError(f"residual must be {expected}, got {tuple(residual.shape)} on {residual.device}")
