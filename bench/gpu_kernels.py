"""The weights that are measured, and every way to run them: our kernels, the packed layer's own choice, and the rivals.

A `Way` prepares a weight once and multiplies by it. Kernels are called through their modules, so that a dry run can put
stand-ins in their places (`gpu_dry`), and the rivals through torch, as a user would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sparsekit_kernels import (
    cusparselt,
    fragments24,
    layout24,
    layout_block,
    prefill24,
    spmm24,
    spmm24_mma,
    spmm_block,
    target,
)
from sparsekit_kernels.quant import GRIDS, dequantize24, quantize24
from torch import Tensor

from sparsekit.backends import BACKENDS
from sparsekit.formats import PackedWeight, WeightSpec

LAYERS = {  # N, K: the linear layers of one block of Llama-3-8B and of 70B, with q, k, v and gate, up in one
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B o": (8192, 8192),
    "70B gate_up": (57344, 8192),
    "70B down": (8192, 28672),
}
FORMATS = ("semi24", *GRIDS)
AUTO_BACKEND = "triton"  # whose choice "auto" is; a dry run has the reference
BLOCK_FORMATS = {  # name -> block, share of the blocks stored
    f"block {side}x{side} {sparsity}%": ((side, side), 1 - sparsity / 100)
    for side in (64, 128)
    for sparsity in (50, 75, 90)
}


@dataclass(frozen=True)
class Weight:
    """One sparse weight.

    Attributes:
        format: a name in `FORMATS` or `BLOCK_FORMATS`.
        dense: [N, K], what it stands for: in the dtype of x where that is exact, else in float32.
        tensors: the canonical layout.
    """

    format: str
    dense: Tensor
    tensors: tuple[Tensor, ...]
    dtype: torch.dtype

    @property
    def N(self) -> int:
        return self.dense.shape[0]

    @property
    def K(self) -> int:
        return self.dense.shape[1]


def random24(N: int, K: int, dtype: torch.dtype, device: torch.device, zeros: float = 0.01) -> Tensor:
    """A random weight in which each group of four keeps two random entries, and a share of all is zero besides."""
    pairs = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    choice = torch.randint(6, (N, -(-K // 4)), device=device)
    keep = pairs.to(device=device, dtype=torch.bool)[choice].view(N, -1)[:, :K]
    w = torch.randn(N, K, device=device).mul_(keep)
    w = w.mul_(torch.rand(N, K, device=device) >= zeros) if zeros else w
    return (w + 0.0).to(dtype)  # -0.0 would not come back


def random_blocks(
    N: int, K: int, block: tuple[int, int], density: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A random weight with the given share of its blocks, at random places."""
    (BN, BK), (NB, KB) = block, layout_block.block_grid(N, K, block)
    keep = torch.zeros(NB * KB, dtype=torch.bool, device=device)
    keep[torch.randperm(NB * KB, device=device)[: max(round(density * NB * KB), 1)]] = True
    grid = keep.view(NB, 1, KB, 1).expand(NB, BN, KB, BK).reshape(NB * BN, KB * BK)[:N, :K]
    return (torch.randn(N, K, device=device).mul_(grid) + 0.0).to(dtype)


def pack(w_NK: Tensor, format: str) -> Weight:
    """Return a dense weight in a format; the quantised ones stand for other numbers than `w_NK`, near to it."""
    if format in BLOCK_FORMATS:
        return Weight(format, w_NK, layout_block.compress_block(w_NK, BLOCK_FORMATS[format][0]), w_NK.dtype)
    K = w_NK.shape[1]
    values, meta = layout24.compress24(w_NK)
    if format == "semi24":
        return Weight(format, w_NK, (values, meta), w_NK.dtype)
    q, scales = quantize24(values, format, K)
    dense = layout24.decompress24(dequantize24(q, scales, format, K, torch.float32), meta, K)
    return Weight(format, dense, (q, meta, scales), w_NK.dtype)


Prepared = tuple[Tensor, ...]


@dataclass(frozen=True)
class Way:
    """One way to multiply by a weight.

    Attributes:
        name: as in rows and tables.
        why_not: returns a reason why it cannot run a weight, or None.
        prepare: returns its own layout of a weight.
        linear: (x, prepared, weight, options of the kernel) -> y.
        most_tokens: it is not meant for more.
    """

    name: str
    why_not: Callable[[Weight], str | None]
    prepare: Callable[[Weight], Prepared]
    linear: Callable[..., Tensor]
    most_tokens: int = 1 << 30


def _always(weight: Weight) -> str | None:
    return None


def _only(*formats: str) -> Callable[[Weight], str | None]:
    def why_not(weight: Weight) -> str | None:
        return None if weight.format in formats else f"it runs {', '.join(formats)}, not {weight.format}"

    return why_not


def mma_kernel(format: str) -> Callable[..., Tensor]:
    """Return the fragment kernel of a format."""
    return getattr(spmm24_mma, format.replace("semi24", "spmm24"))


def _mma_prepare(weight: Weight, gated: bool = False) -> Prepared:
    values, meta, *scales = weight.tensors
    fragments = fragments24.prepare(values, meta, weight.format, gated)
    if weight.format == "semi24_int4":
        scales = [fragments24.prepare_scales(scales[0], gated)]
    return (*fragments, *scales)


def _mma_linear(x: Tensor, prepared: Prepared, weight: Weight, **options: Any) -> Tensor:
    return mma_kernel(weight.format)(x, *prepared, weight.N, **options)


def _mma_why_not(weight: Weight) -> str | None:
    if weight.format not in FORMATS:
        return f"it runs 2:4, not {weight.format}"
    return None if weight.dtype in spmm24_mma.DTYPES else f"x is {weight.dtype}"


def _portable_linear(x: Tensor, prepared: Prepared, weight: Weight, **options: Any) -> Tensor:
    return spmm24.spmm24(x, *prepared, **options)


def _decompress_linear(x: Tensor, prepared: Prepared, weight: Weight, bias: Tensor | None = None) -> Tensor:
    fragments, metadata, *scales = prepared
    options = {"format": weight.format, "scales": scales[0] if scales else None}
    return F.linear(x, spmm24_mma.decompress(fragments, metadata, weight.N, weight.K, x.dtype, **options), bias)


def _prefill_prepare(weight: Weight) -> Prepared:
    return (*_mma_prepare(weight), *(_cusparselt_prepare(weight) if _cusparselt_why_not(weight) is None else ()))


def _prefill_linear(x: Tensor, prepared: Prepared, weight: Weight, **options: Any) -> Tensor:
    fragments, metadata, *others = prepared
    if weight.format == "semi24":
        options["blob"] = others[0] if others else None
    else:
        options["scales"] = others[0]
    return prefill24.spmm24_large(x, fragments, metadata, weight.N, format=weight.format, **options)


def _cusparselt_why_not(weight: Weight) -> str | None:
    if weight.format != "semi24":
        return f"it runs semi24, not {weight.format}"
    return cusparselt.why_not(weight.dtype, weight.N, weight.K, weight.dense.device)


def _cusparselt_prepare(weight: Weight) -> Prepared:
    return cusparselt.prepare(*weight.tensors, weight.K)


def _cusparselt_linear(x: Tensor, prepared: Prepared, weight: Weight, **options: Any) -> Tensor:
    return cusparselt.spmm24(x, prepared[0], weight.N, weight.K, **options)


def _block_prepare(weight: Weight) -> Prepared:
    return spmm_block.prepare(*weight.tensors, target.num_sms(weight.dense.device))


def _block_linear(x: Tensor, prepared: Prepared, weight: Weight, **options: Any) -> Tensor:
    return spmm_block.spmm_block(x, prepared, weight.N, **options)


def spec_of(weight: Weight) -> WeightSpec:
    return WeightSpec(weight.format, weight.N, weight.K, weight.dtype)


def _packed(weight: Weight) -> PackedWeight:
    names = ("values", "meta", "scales")
    return PackedWeight(spec_of(weight), dict(zip(names, weight.tensors, strict=False)))


def _auto_why_not(weight: Weight) -> str | None:
    if weight.format in BLOCK_FORMATS:
        return "blocks are measured by their kernel"
    return BACKENDS.get(AUTO_BACKEND).why_not(spec_of(weight), weight.dense.device)


def _auto_prepare(weight: Weight) -> Prepared:
    return BACKENDS.get(AUTO_BACKEND).prepare(_packed(weight), prefill="auto")


def _auto_linear(x: Tensor, prepared: Prepared, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return BACKENDS.get(AUTO_BACKEND).linear(x, prepared, bias, spec_of(weight))


WAYS = {
    way.name: way
    for way in (
        Way("mma", _mma_why_not, _mma_prepare, _mma_linear, most_tokens=256),
        Way("portable", _only("semi24"), lambda weight: weight.tensors, _portable_linear, most_tokens=64),
        Way("decompress", _mma_why_not, _mma_prepare, _decompress_linear),
        Way("cusparselt", _cusparselt_why_not, _cusparselt_prepare, _cusparselt_linear),
        Way("prefill", _mma_why_not, _prefill_prepare, _prefill_linear),
        Way("block", _only(*BLOCK_FORMATS), _block_prepare, _block_linear),
        Way("auto", _auto_why_not, _auto_prepare, _auto_linear),
    )
}


def dense_mm(x: Tensor, w_NK: Tensor) -> Tensor:
    return torch.mm(x, w_NK.t())


def dense_linear(x: Tensor, w_NK: Tensor) -> Tensor:
    return F.linear(x, w_NK)


def fp8_prepare(weight: Tensor) -> Prepared:
    """The dense fp8 weight with a scale a row, and one scale for all."""
    rows = weight.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 448
    return (weight.float() / rows).to(torch.float8_e4m3fn), rows.t().contiguous()


def fp8_rows(x8: Tensor, x_scale: Tensor, prepared: Sequence[Tensor]) -> Tensor:
    """torch._scaled_mm with a scale for each token and each row; that x is quantised already costs it nothing here."""
    w8, w_scale = prepared
    return torch._scaled_mm(x8, w8.t(), x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def fp8_tensor(x8: Tensor, one: Tensor, prepared: Sequence[Tensor]) -> Tensor:
    """torch._scaled_mm with one scale a tensor."""
    return torch._scaled_mm(x8, prepared[0].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


INT4_GROUP, INT4_INNER_TILES = 128, 8


def int4_numbers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A dense weight in int4: uint8 [N, K], 8 being zero, and scales [N, K/128, 1]."""
    N, K = weight.shape
    groups = weight.float().view(N, K // INT4_GROUP, INT4_GROUP)
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return ((groups / scales).round().clamp(-8, 7) + 8).to(torch.uint8).view(N, K), scales


def gemlite_layer(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """gemlite's dense int4 layer, for machines that have it."""
    from gemlite.helper import A16Wn

    q, scales = int4_numbers(weight)
    scales = scales.squeeze(-1).to(weight.dtype)
    maker = A16Wn(device=str(weight.device), dtype=weight.dtype)
    return maker.from_weights(q, scales, torch.full_like(scales, 8), W_nbits=4, group_size=INT4_GROUP)


def int4_prepare(weight: Tensor) -> Prepared:
    """torch's own dense int4 (tinygemm): packed weight, and [K/128, N, 2] scales and zeros."""
    q, scales = int4_numbers(weight)
    packed = torch._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], INT4_INNER_TILES)
    both = torch.cat([scales, torch.zeros_like(scales)], -1)  # [N, K/128, 2]
    return packed, both.transpose(0, 1).contiguous().to(torch.bfloat16)


def int4_linear(x: Tensor, prepared: Sequence[Tensor]) -> Tensor:
    return torch._weight_int4pack_mm(x, prepared[0], INT4_GROUP, prepared[1])


def torch24_prepare(w_NK: Tensor) -> Tensor:
    """torch's own 2:4 tensor."""
    return torch.sparse.to_sparse_semi_structured(w_NK)
