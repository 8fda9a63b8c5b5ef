"""`triton`: our kernels on NVIDIA GPUs, straight from the canonical layout."""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from sparsekit_kernels import target
from sparsekit_kernels.layout24 import decompress24
from sparsekit_kernels.layout_block import decompress_block
from torch import Tensor

from sparsekit.backends.base import BACKENDS, Backend, Runner
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec

BLOCK_SIDE = 16
"""Sides of blocks are multiples of it, see `sparsekit_kernels.spmm_block`."""


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


class BlockRunner(Runner):
    format = "block"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if spec.block is not None and any(side % BLOCK_SIDE for side in spec.block):
            rows, columns = spec.block
            return f"its blocks have sides that are multiples of {BLOCK_SIDE}, these are {rows}x{columns}"
        return target.why_not(device)

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        values = packed.tensors["values"]
        prepared: tuple[Tensor, ...] = _kernels("spmm_block").prepare(
            *packed.tensors.values(), num_sms=target.num_sms(values.device)
        )
        return prepared

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        return PackedWeight(spec, dict(zip(FORMATS.get("block").names, prepared[:3], strict=True)))

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        y: Tensor = _kernels("spmm_block").spmm_block(x, prepared, N, bias)
        return y

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        values, columns, row_pointers = prepared[:3]
        return decompress_block(values, columns, row_pointers, N, K)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        config = _kernels("spmm_block").pick_config(num_tokens, spec.dtype, BLOCK_SIDE)
        return f"spmm_block, {config.kernel}"


BACKENDS.register("triton", Backend("triton", [Semi24Runner(), BlockRunner()]))
