"""`triton`: our kernels on NVIDIA GPUs, straight from the canonical layout."""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from sparsekit_kernels import target
from sparsekit_kernels.layout24 import decompress24
from torch import Tensor

from sparsekit.backends.base import BACKENDS, Backend, Runner
from sparsekit.formats import PackedWeight, WeightSpec


@functools.cache
def _kernels(name: str) -> ModuleType:
    """Import a kernel module when it first runs: a machine without Triton never asks."""
    import importlib

    return importlib.import_module(f"sparsekit_kernels.{name}")


class Semi24Runner(Runner):
    format = "semi24"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        return target.why_not(device)

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        return packed.tensors["values"].contiguous(), packed.tensors["meta"].contiguous()

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        return PackedWeight(spec, {"values": prepared[0], "meta": prepared[1]})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        values, meta = prepared
        return _kernels("spmm24").spmm24(x, values, meta, bias)

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        values, meta = prepared
        return decompress24(values, meta, K)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        from sparsekit_kernels.spmm24 import DENSE_ABOVE

        return "spmm24" if num_tokens <= DENSE_ABOVE else "decompress24, then torch's dense product"


BACKENDS.register("triton", Backend("triton", [Semi24Runner()]))
