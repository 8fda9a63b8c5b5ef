"""Stand-ins for the kernels in a dry run: called as the kernels are, right on the CPU, slow.

Every stand-in first binds its arguments to the signature of the function whose place it takes, and then reads the
weight back from the layout it was given: a call that a GPU would refuse, or that mixes up two tensors, fails here too.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import gpu_kernels
import torch
import torch.nn.functional as F
from sparsekit_kernels import (
    compress24,
    cusparselt,
    fragments24,
    kd_loss,
    layout24,
    layout_block,
    spmm24,
    spmm24_mma,
    spmm_block,
    target,
)
from sparsekit_kernels.quant import GRIDS, dequantize24
from sparsekit_kernels.reference import kd_loss_reference
from torch import Tensor

from sparsekit import NM

Arguments = dict[str, Any]


@functools.cache
def install() -> None:
    """Put every stand-in into the module of its kernel, once."""
    _replace(target, "num_sms", lambda a: 132)
    _replace(spmm24, "spmm24_small", _portable)
    _replace(spmm24, "spmm24_large", _portable)
    _replace(spmm24, "spmm24", _portable)
    _replace(spmm24, "decompress24", lambda a: layout24.decompress24(a["values"], a["meta"], a["K"]))
    _replace(compress24, "compress24", lambda a: layout24.compress24(a["w_NK"]))
    _replace(compress24, "search24", _search24)
    _replace(cusparselt, "why_not", lambda a: None if a["dtype"] in cusparselt.DTYPES else "16 bits only")
    _replace(cusparselt, "prepare", lambda a: (layout24.decompress24(a["values"], a["meta"], a["K"]),))
    _replace(cusparselt, "restore", lambda a: layout24.compress24(a["packed"]))
    _replace(cusparselt, "spmm24", lambda a: F.linear(a["x"], a["packed"], a["bias"]))
    _replace(spmm_block, "spmm_block", _block)
    _replace(kd_loss, "kd_loss", lambda a: kd_loss_reference(**a))
    _replace(spmm24_mma, "decompress", _decompress)
    for format in gpu_kernels.FORMATS:
        _replace(spmm24_mma, format.replace("semi24", "spmm24"), _mma(format))
    gpu_kernels.AUTO_BACKEND = "reference"


def _replace(module: ModuleType, name: str, stand_in: Callable[[Arguments], Any]) -> None:
    signature = inspect.signature(getattr(module, name))

    def bound(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        return stand_in(arguments.arguments)

    setattr(module, name, bound)


def _portable(a: Arguments) -> Tensor:
    return F.linear(a["x"], layout24.decompress24(a["values"], a["meta"], a["x"].shape[-1]), a["bias"])


def _from_fragments(a: Arguments, format: str, N: int, K: int, dtype: torch.dtype, gated: bool) -> Tensor:
    """The dense weight that fragments, metadata and scales hold."""
    storage = dtype if format == "semi24" else GRIDS[format].storage
    values, meta = fragments24.restore(a["fragments"], a["metadata"], format, N, K, storage, gated)
    if format != "semi24":
        scales = a["scales"]
        if format == "semi24_int4":
            scales = fragments24.restore_scales(scales, N, K, gated)
        values = dequantize24(values, scales, format, K, torch.float32)
    return layout24.decompress24(values, meta, K)


def _mma(format: str) -> Callable[[Arguments], Tensor]:
    def spmm24_mma(a: Arguments) -> Tensor:
        x, gated = a["x"], a["activation"] == "silu_mul"
        y = F.linear(x.float(), _from_fragments(a, format, a["N"], x.shape[-1], x.dtype, gated).float())
        y = y if a["bias"] is None else y + a["bias"].float()
        if gated:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return (y if a["residual"] is None else y + a["residual"].float()).to(x.dtype)

    return spmm24_mma


def _decompress(a: Arguments) -> Tensor:
    return _from_fragments(a, a["format"], a["N"], a["K"], a["dtype"], a["gated"]).to(a["dtype"])


def _block(a: Arguments) -> Tensor:
    x, (values, columns, row_pointers, *_) = a["x"], a["prepared"]
    w = layout_block.decompress_block(values, columns, row_pointers, a["N"], x.shape[-1])
    y = F.linear(x, w, a["bias"])
    return y if a["residual"] is None else y + a["residual"]


def _search24(a: Arguments) -> Any:
    w, scores = a["w_NK"], a["scores_NK"]
    keep = NM(2, 4).project((w.abs() if scores is None else scores).float())
    masked = torch.where(keep, w, torch.zeros_like(w)) + 0.0
    return compress24.Searched24(
        *layout24.compress24(masked), keep if a["keep"] else None, masked if a["masked"] else None
    )
